"""k nearest neighbours: the three most similar known digits vote, the nearer one with more weight."""

import heapq
import math
import sys
from collections import defaultdict

K = 3


def read(lines):
    return [tuple(map(float, line.split(","))) for line in lines]


def classify(digit, known):
    nearest = heapq.nsmallest(K, ((math.dist(digit, pixels), label) for pixels, label in known))
    votes = defaultdict(float)
    for distance, label in nearest:
        votes[label] += 1 / (1 + distance)
    return max(votes, key=votes.get)


def main():
    with open(sys.argv[1], encoding="ascii") as file:
        known = [(row[:-1], int(row[-1])) for row in read(file)]
    for digit in read(sys.stdin):
        print(classify(digit, known))


main()

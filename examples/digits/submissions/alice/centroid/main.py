"""Nearest centroid: each class is the mean of its digits; a new digit belongs to the nearest mean."""

import math
import sys


def read(lines):
    return [tuple(map(float, line.split(","))) for line in lines]


def means(rows):
    by_label = {}
    for row in rows:
        by_label.setdefault(int(row[-1]), []).append(row[:-1])
    return {
        label: tuple(sum(column) / len(members) for column in zip(*members))
        for label, members in by_label.items()
    }


def main():
    with open(sys.argv[1], encoding="ascii") as file:
        centroids = means(read(file))
    for digit in read(sys.stdin):
        print(min(centroids, key=lambda label: math.dist(digit, centroids[label])))


main()

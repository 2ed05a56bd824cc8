"""An averaged multiclass perceptron: ten linear scores, corrected at each mistake, averaged over time."""

import random
import sys
from operator import mul

EPOCHS = 8
LABELS = range(10)


def read(lines):
    return [[int(value) for value in line.split(",")] for line in lines]


def best(weights, pixels):
    scores = [sum(map(mul, weights[label], pixels)) for label in LABELS]
    return scores.index(max(scores))


def train(rows):
    """Weights averaged over all steps: `drift` remembers when each correction was made."""
    examples = [([*row[:-1], 16], row[-1]) for row in rows]
    weights = [[0] * 65 for _ in LABELS]
    drift = [[0] * 65 for _ in LABELS]
    order = random.Random(1)
    step = 0
    for _ in range(EPOCHS):
        order.shuffle(examples)
        for pixels, label in examples:
            step += 1
            guess = best(weights, pixels)
            if guess == label:
                continue
            for index, value in enumerate(pixels):
                weights[label][index] += value
                weights[guess][index] -= value
                drift[label][index] += step * value
                drift[guess][index] -= step * value
    return [[w * step - d for w, d in zip(weights[label], drift[label])] for label in LABELS]


def main():
    with open(sys.argv[1], encoding="ascii") as file:
        weights = train(read(file))
    for pixels in read(sys.stdin):
        print(best(weights, [*pixels, 16]))


main()

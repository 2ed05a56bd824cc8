"""Word prediction and range coding: what the words before make likely costs few bits.

1. A verse label that follows from the one before it is left out ("Ge1:2" after "Ge1:1").
2. The text is cut into words with the space before them, numbers, and punctuation.
3. A model that learns as it goes predicts each token from the two tokens before it, else from the one before,
   else from how often it came. A token never seen is spelled, its letters predicted in the same way.
4. A range coder turns the predictions into bytes. Restoring runs the same model.
"""

import re
import sys

LABEL = re.compile(r"([A-Za-z]{1,20})([0-9]{1,6}):([0-9]{1,6}) ")
TOKEN = re.compile(r" ?[A-Za-z]+| ?[0-9]+|[^A-Za-z0-9]+?(?= ?[A-Za-z0-9]|\Z)")
KEPT = "\0"
END = ""
WORD_ORDER = 2
LETTER_ORDER = 2
LETTERS = 256

MASK = (1 << 64) - 1
TOP = 1 << 56
BOTTOM = 1 << 48


class RangeCoder:
    """Carry-less, after Subbotin: keeps an interval [low, low + range) and shifts out its settled bytes."""

    def __init__(self, data=None):
        self.low, self.range = 0, MASK
        self.out = bytearray()
        self.data = data
        if data is not None:
            self.value, self.position = int.from_bytes(data[:8].ljust(8, b"\0"), "big"), 8

    def narrow(self, start, size):
        """To the symbol's part; `share` or `put` has divided range by the total before."""
        self.low = (self.low + start * self.range) & MASK
        self.range *= size
        while True:
            if (self.low ^ (self.low + self.range)) >= TOP:
                if self.range >= BOTTOM:
                    return
                self.range = -self.low & (BOTTOM - 1)
            self._shift()
            self.low = (self.low << 8) & MASK
            self.range = (self.range << 8) & MASK

    def _shift(self):
        if self.data is None:
            self.out.append(self.low >> 56)
        else:
            byte = self.data[self.position] if self.position < len(self.data) else 0
            self.value = (self.value << 8 | byte) & MASK
            self.position += 1

    def put(self, start, size, total):
        self.range //= total
        self.narrow(start, size)

    def share(self, total):
        """Which of `total` equal shares the coded value lies in."""
        self.range //= total
        return min(total - 1, ((self.value - self.low) & MASK) // self.range)

    def finish(self):
        return bytes(self.out) + self.low.to_bytes(8, "big")


class Seen:
    """What has followed one context, and how often; roughly the most frequent first."""

    __slots__ = ("counts", "places", "symbols", "total")

    def __init__(self):
        self.symbols, self.counts, self.places, self.total = [], [], {}, 0

    def add(self, symbol):
        self.total += 1
        place = self.places.get(symbol)
        if place is None:
            self.places[symbol] = len(self.symbols)
            self.symbols.append(symbol)
            self.counts.append(1)
            return
        self.counts[place] += 1
        if place and self.counts[place] > self.counts[place - 1]:
            other = self.symbols[place - 1]
            self.symbols[place - 1 : place + 1] = symbol, other
            self.counts[place - 1 : place + 1] = self.counts[place], self.counts[place - 1]
            self.places[symbol], self.places[other] = place - 1, place


class Model:
    """Prediction by partial matching: the longest known context first, an escape to the next shorter one."""

    def __init__(self, order):
        self.tables = [{} for _ in range(order + 1)]
        self.order = order

    def contexts(self, history):
        """From the longest to the empty one."""
        return [
            self.tables[size].setdefault(tuple(history[len(history) - size :]), Seen())
            for size in range(self.order, -1, -1)
        ]

    def put(self, coder, contexts, symbol):
        """Encode; False if no context knows the symbol."""
        for level, seen in enumerate(contexts):
            kinds = len(seen.symbols)
            if not kinds:
                continue
            place = seen.places.get(symbol)
            if place is not None:
                coder.put(sum(seen.counts[:place]), seen.counts[place], seen.total + kinds)
                self.learn(contexts[: level + 1], symbol)
                return True
            coder.put(seen.total, kinds, seen.total + kinds)
        return False

    def get(self, coder, contexts):
        """Decode; None after an escape from every context."""
        for level, seen in enumerate(contexts):
            kinds = len(seen.symbols)
            if not kinds:
                continue
            share = coder.share(seen.total + kinds)
            if share >= seen.total:
                coder.narrow(seen.total, kinds)
                continue
            start = place = 0
            while start + seen.counts[place] <= share:
                start += seen.counts[place]
                place += 1
            symbol = seen.symbols[place]
            coder.narrow(start, seen.counts[place])
            self.learn(contexts[: level + 1], symbol)
            return symbol
        return None

    def learn(self, contexts, symbol):
        """Only contexts as long as the one that knew it: shorter ones keep what they alone can tell."""
        for seen in contexts:
            seen.add(symbol)


class Text:
    """The two models: tokens, and the letters of tokens never seen."""

    def __init__(self, coder):
        self.coder = coder
        self.words, self.letters = Model(WORD_ORDER), Model(LETTER_ORDER)
        self.history = [END] * WORD_ORDER

    def put(self, token):
        contexts = self.words.contexts(self.history)
        if not self.words.put(self.coder, contexts, token):
            self.spell(token)
            self.words.learn(contexts, token)
        self.history = [*self.history[1:], token]

    def get(self):
        contexts = self.words.contexts(self.history)
        token = self.words.get(self.coder, contexts)
        if token is None:
            token = self.read()
            self.words.learn(contexts, token)
        self.history = [*self.history[1:], token]
        return token

    def spell(self, token):
        """Each letter, then LETTERS for the end."""
        history = [LETTERS] * LETTER_ORDER
        for letter in [*token.encode("latin-1"), LETTERS]:
            contexts = self.letters.contexts(history)
            if not self.letters.put(self.coder, contexts, letter):
                self.coder.put(letter, 1, LETTERS + 1)
                self.letters.learn(contexts, letter)
            history = [*history[1:], letter]

    def read(self):
        history = [LETTERS] * LETTER_ORDER
        token = bytearray()
        while True:
            contexts = self.letters.contexts(history)
            letter = self.letters.get(self.coder, contexts)
            if letter is None:
                letter = self.coder.share(LETTERS + 1)
                self.coder.narrow(letter, 1)
                self.letters.learn(contexts, letter)
            if letter == LETTERS:
                return token.decode("latin-1")
            token.append(letter)
            history = [*history[1:], letter]


def next_label(line):
    """The label that should begin the line after this one."""
    label = LABEL.match(line)
    return f"{label[1]}{label[2]}:{int(label[3]) + 1} " if label else None


def without_labels(text):
    lines, expected = [], None
    for line in text.split("\n"):
        rest = line.removeprefix(expected) if expected else line
        drop = rest != line and not rest.startswith(KEPT)
        lines.append(rest if drop else KEPT + line)
        expected = next_label(line)
    return "\n".join(lines)


def with_labels(text):
    lines, expected = [], None
    for line in text.split("\n"):
        lines.append(line[1:] if line.startswith(KEPT) else expected + line)
        expected = next_label(lines[-1])
    return "\n".join(lines)


def compress(data):
    coder = RangeCoder()
    text = Text(coder)
    for token in TOKEN.findall(without_labels(data.decode("latin-1"))):
        text.put(token)
    text.put(END)
    return coder.finish()


def restore(data):
    text = Text(RangeCoder(data))
    return with_labels("".join(iter(text.get, END))).encode("latin-1")


def main():
    work = {"compress": compress, "restore": restore}[sys.argv[1]]
    sys.stdout.buffer.write(work(sys.stdin.buffer.read()))


if __name__ == "__main__":
    main()

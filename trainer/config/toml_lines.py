"""Line numbers of the keys in a TOML text, which the parser does not tell."""

import bisect
import contextlib
from collections import defaultdict

import tomli

KeyPath = tuple[str | int, ...]
"""Names of tables and keys; an integer is a position in an array."""

_BARE_VALUE_END = ",]}#\n"
_BARE_KEY_END = " \t.=]\n"


def locate_keys(text: str) -> dict[KeyPath, int]:
    """Line (from 1) at which each key, table and array item of a TOML text first appears.

    Args:
        text: TOML that the parser has accepted. Of a text that it has not, the answer may be partial.
    """
    scanner = _Scanner(text.replace("\r\n", "\n"))
    with contextlib.suppress(IndexError):  # ran past the end: not TOML; what was found until here is still right
        scanner.scan()
    return scanner.lines


class _Scanner:
    """Walks over the text once, keeping track of the table it is in. It checks nothing: the parser already has."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.pos = 0
        self.lines: dict[KeyPath, int] = {}
        self.array_lengths: defaultdict[KeyPath, int] = defaultdict(int)
        self.newlines = [i for i, char in enumerate(text) if char == "\n"]

    def scan(self) -> None:
        table: KeyPath = ()
        while self.skip_blank():
            if self.text.startswith("[[", self.pos):
                self.pos += 2
                table = self.enter_array_table(self.read_key())
                self.pos += 2
            elif self.text[self.pos] == "[":
                self.pos += 1
                table = self.enter_table(self.read_key())
                self.pos += 1
            else:
                self.read_pair(table)

    def enter_table(self, parts: list[str]) -> KeyPath:
        path: KeyPath = ()
        for part in parts:
            path = (*path, part)
            self.record(path)
            if path in self.array_lengths:  # inside an array of tables, a name means the newest item
                path = (*path, self.array_lengths[path] - 1)
        return path

    def enter_array_table(self, parts: list[str]) -> KeyPath:
        array = (*self.enter_table(parts[:-1]), parts[-1])
        self.record(array)
        item = (*array, self.array_lengths[array])
        self.array_lengths[array] += 1
        self.record(item)
        return item

    def read_pair(self, table: KeyPath) -> None:
        path = table
        for part in self.read_key():
            path = (*path, part)
            self.record(path)
        self.pos += 1  # the equals sign
        self.skip_value(path)

    def record(self, path: KeyPath) -> None:
        self.lines.setdefault(path, bisect.bisect_left(self.newlines, self.pos) + 1)

    def skip_blank(self) -> bool:
        """Skips white space, line ends and comments; False at the end of the text."""
        while self.pos < len(self.text):
            if self.text[self.pos] == "#":
                end = self.text.find("\n", self.pos)
                self.pos = len(self.text) if end < 0 else end
            elif self.text[self.pos] in " \t\n":
                self.pos += 1
            else:
                return True
        return False

    def skip_spaces(self) -> None:
        while self.text[self.pos] in " \t":
            self.pos += 1

    def read_key(self) -> list[str]:
        """Parts of a dotted key; stops at the character that ends it."""
        parts = []
        while True:
            self.skip_spaces()
            start = self.pos
            if self.text[self.pos] in "\"'":
                self.skip_string()
                parts.append(tomli.loads("key = " + self.text[start : self.pos])["key"])
            else:
                while self.text[self.pos] not in _BARE_KEY_END:
                    self.pos += 1
                parts.append(self.text[start : self.pos])
            self.skip_spaces()
            if self.text[self.pos] != ".":
                return parts
            self.pos += 1

    def skip_value(self, path: KeyPath) -> None:
        self.skip_blank()
        char = self.text[self.pos]
        if char in "\"'":
            self.skip_string()
        elif char == "[":
            self.skip_array(path)
        elif char == "{":
            self.skip_inline_table(path)
        else:
            while self.pos < len(self.text) and self.text[self.pos] not in _BARE_VALUE_END:
                self.pos += 1

    def skip_array(self, path: KeyPath) -> None:
        self.pos += 1
        index = 0
        while self.skip_blank() and self.text[self.pos] != "]":
            self.record((*path, index))
            self.skip_value((*path, index))
            self.skip_comma()
            index += 1
        self.pos += 1

    def skip_inline_table(self, path: KeyPath) -> None:
        self.pos += 1
        while self.skip_blank() and self.text[self.pos] != "}":
            self.read_pair(path)
            self.skip_comma()
        self.pos += 1

    def skip_comma(self) -> None:
        self.skip_blank()
        if self.text[self.pos] == ",":
            self.pos += 1

    def skip_string(self) -> None:
        quote = self.text[self.pos]
        if self.text.startswith(quote * 3, self.pos):
            self.pos += 3
            self.skip_to(quote * 3, escapes=quote == '"')
            # Up to two more quotes may belong to the content, just before the closing three.
            while self.pos < len(self.text) and self.text[self.pos] == quote:
                self.pos += 1
        else:
            self.pos += 1
            self.skip_to(quote, escapes=quote == '"')

    def skip_to(self, end: str, *, escapes: bool) -> None:
        while not self.text.startswith(end, self.pos):
            self.pos += 2 if escapes and self.text[self.pos] == "\\" else 1
            if self.pos > len(self.text):
                raise IndexError("the string does not end")
        self.pos += len(end)

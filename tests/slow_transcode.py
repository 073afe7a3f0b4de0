"""The slow twin of transcoding: one student token after another, each draw read after the whole text before it."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate

MASSES = ("accepted", "rejected", "short", "open", "dropped")


@dataclass
class Slow:
    """A text without control tokens but at its end; draws[j] is {teacher id: weight} or None.

    encode and teachers_encode cut bytes into ids; control is {teacher's control token: the student's, or -1}; kernel is
    {(token, by_cuts): {token: share}}, what an open draw that ends with a token becomes.
    """

    teacher_ids: list
    draws: list
    of_teacher: tuple
    of_student: tuple
    encode: object
    teachers_encode: object
    control: dict
    kernel: dict = field(default_factory=dict)

    def __post_init__(self):
        self.text = b"".join(self.of_teacher[token] or b"" for token in self.teacher_ids)
        ends_in_control = self.of_teacher[self.teacher_ids[-1]] is None
        ids = self.encode(self.text)
        self.starts_s = [0, *accumulate(len(self.of_student[token]) for token in ids)]
        self.starts_t = [0, *accumulate(len(self.of_teacher[token] or b"") for token in self.teacher_ids)][:-1]
        self.tokens = ids + [self.control[self.teacher_ids[-1]]] * ends_in_control
        self.cut, self.read = cache(self.teachers_encode), cache(self.read_anew)

    def which(self, i):
        return bisect_right(self.starts_t, self.starts_s[i]) - 1

    def read_anew(self, before, draw, i):
        """(fate, the student's token, what it may become, whether cuts tell that) of a draw after the bytes before."""
        begin = self.starts_s[i]
        piece = self.of_teacher[draw] if draw < len(self.of_teacher) else None
        whole = before + (piece or b"")
        size = min(len(whole), begin)
        if whole[:size] != self.text[:size]:
            return "rejected", None, None, None
        if piece is not None and len(whole) <= begin:
            return "short", None, None, None
        read = self.encode(whole)
        cuts = [0, *accumulate(len(self.of_student[t]) for t in read)]
        if cuts[: i + 1] != self.starts_s[: i + 1]:
            return "rejected", None, None, None
        if piece is None and len(whole) == begin:
            there = self.control.get(draw, -1)
            return ("rejected", None, None, None) if there < 0 else ("decided", there, {there}, None)
        if piece is None or cuts[i + 1] != len(whole):
            return "decided", read[i], {read[i]}, None
        members, by_cuts = self.members(read[i], draw)
        return "open" if len(members) > 1 else "decided", read[i], members, by_cuts

    def members(self, token, draw):
        """Tokens whose own text the teacher cuts as it cuts this one's, if that ends in the draw; else by bytes."""
        mine = self.cut(self.of_student[token])
        if mine and mine[-1] == draw:
            cuts = ((v, self.cut(p)) for v, p in enumerate(self.of_student) if p)
            return {v for v, cut in cuts if cut and cut[: len(mine)] == mine} | {token}, True
        return {v for v, p in enumerate(self.of_student) if p and p.startswith(self.of_student[token])}, False


def slow_transcode(slow, *, chain, unresolved="point"):
    """One (token, targets, masses) per student token: {student id: weight}, the five masses."""
    found = []
    for i, token in enumerate(slow.tokens):
        which = slow.which(i)
        masses = dict.fromkeys(MASSES, 0.0)
        targets = Counter()

        def spread(before, which, factor, left, i=i, masses=masses, targets=targets):
            for draw, weight in slow.draws[which].items():
                weight = weight * factor
                fate, answer, _, by_cuts = slow.read(before, draw, i)
                if fate in ("rejected", "short"):
                    masses[fate] += weight
                    continue
                following = which + 1
                can = following < len(slow.teacher_ids) and slow.draws[following]
                if fate == "open" and left and can and draw == slow.teacher_ids[which]:
                    share = weight / sum(slow.draws[following].values())
                    spread(before + slow.of_teacher[draw], following, share, left - 1)
                    continue
                masses["open"] += weight * (fate == "open")
                if fate == "open" and unresolved == "drop":
                    masses["dropped"] += weight
                    continue
                shares = slow.kernel[answer, by_cuts] if fate == "open" and unresolved == "kernel" else {answer: 1}
                for token, share in shares.items():
                    targets[token] += weight * share
                masses["accepted"] += weight

        if slow.draws[which]:
            spread(slow.text[: slow.starts_t[which]], which, 1.0, chain)
        total = sum(masses[name] for name in ("accepted", "rejected", "short", "dropped"))
        scale = total / masses["accepted"] if masses["accepted"] else 0
        found.append((token, {t: w * scale for t, w in sorted(targets.items())}, masses))
    return found


def slow_counts(slow, *, chain):
    """{(token, by_cuts, what it became): times}: open draws that came, followed."""
    found = Counter()
    for i, label in enumerate(slow.tokens[:-1]):
        which = slow.which(i)
        before = slow.text[: slow.starts_t[which]]
        for came in slow.teacher_ids[which : which + chain + 1]:
            fate, answer, members, by_cuts = slow.read(before, came, i)
            if fate != "open" or label not in members:
                break
            found[answer, by_cuts, label] += 1
            before += slow.of_teacher[came]
    return found


def slow_kernel(found, sets):
    """{(token, by_cuts): {v: share}} of sets {(token, by_cuts): members}: Witten and Bell's smoothing, set by set."""
    kernel = {}
    for name, members in sets.items():
        came = {v: found[*name, v] for v in members}
        kinds = max(1, sum(n > 0 for n in came.values()))
        kernel[name] = {v: (n + kinds / len(came)) / (sum(came.values()) + kinds) for v, n in came.items()}
    return kernel


def slow_sets(slow, *, chain):
    """One {student id or frozenset of ids: weight, negative for a condition} per student token."""
    found = []
    for i in range(len(slow.tokens)):
        which, targets, known = slow.which(i), Counter(), None
        label = slow.tokens[i] if i + 1 < len(slow.tokens) else None  # the last one's end is not told
        before = slow.text[: slow.starts_t[which]]

        def lies(fate, members, by_cuts):
            told = fate in ("open", "decided")
            return told and (known is None or (members <= known[0] and (fate == "decided" or by_cuts or not known[1])))  # noqa: B023

        for level in range(chain + 2):
            draws = slow.draws[which] if which < len(slow.teacher_ids) and level <= chain else None
            if not level and not draws:
                break
            told, total = Counter(), sum(draws.values()) if not level else 1
            for draw, weight in (draws or {}).items():
                fate, answer, members, by_cuts = slow.read(before, draw, i)
                if lies(fate, members, by_cuts):
                    told[frozenset(members) if fate == "open" else answer] += weight
            came = slow.teacher_ids[which] if which < len(slow.teacher_ids) else None
            fate, _, members, by_cuts = slow.read(before, came, i) if draws else ("short", None, None, None)
            agrees = lies(fate, members, by_cuts) and label in members
            if known:
                targets[known[0]] -= 1
            if told and (agrees or label is None):
                for key, weight in told.items():
                    targets[key] += weight * total / sum(told.values())
            elif label is not None:
                targets[label] += total
            if not (told and agrees and fate == "open"):
                break
            known = frozenset(members), by_cuts
            before, which = before + slow.of_teacher[came], which + 1
        found.append({key: weight for key, weight in targets.items() if abs(weight) > 1e-12})
    return found

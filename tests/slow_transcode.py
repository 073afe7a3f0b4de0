"""The slow twin of transcoding: one student token after another, each draw read after the whole text before it."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate


def slow_transcode(teacher_ids, draws, of_teacher, of_student, encode, control, *, chain, unresolved="point"):
    """A text without control tokens but at its end; draws[j] is {teacher id: weight} or None.

    Returns one (token, targets, masses, opens) per student token: {student id: weight}, the five masses.
    """
    text = b"".join(of_teacher[token] or b"" for token in teacher_ids)
    ends_in_control = of_teacher[teacher_ids[-1]] is None
    ids = encode(text)
    starts_s = [0, *accumulate(len(of_student[token]) for token in ids)]
    starts_t = [0, *accumulate(len(of_teacher[token] or b"") for token in teacher_ids)][:-1]
    tokens = ids + [control[teacher_ids[-1]]] * ends_in_control
    found = []
    for i, token in enumerate(tokens):
        begin = starts_s[i]
        which = bisect_right(starts_t, begin) - 1
        masses = dict.fromkeys(("accepted", "rejected", "short", "open", "dropped"), 0.0)
        targets = {}

        def spread(before, which, factor, left, begin=begin, i=i, masses=masses, targets=targets):
            for draw, weight in draws[which].items():
                weight = weight * factor
                piece = of_teacher[draw] if draw < len(of_teacher) else None
                whole = before + (piece or b"")
                size = min(len(whole), begin)
                if whole[:size] != text[:size]:
                    masses["rejected"] += weight
                    continue
                if piece is not None and len(whole) <= begin:
                    masses["short"] += weight
                    continue
                read = encode(whole)
                cuts = [0, *accumulate(len(of_student[t]) for t in read)]
                if cuts[: i + 1] != starts_s[: i + 1]:
                    masses["rejected"] += weight
                    continue
                if piece is None and len(whole) == begin:
                    if control.get(draw, -1) < 0:
                        masses["rejected"] += weight
                        continue
                    answer, is_open = control[draw], False
                else:
                    answer = read[i]
                    ends = piece is not None and cuts[i + 1] == len(whole)
                    is_open = ends and any(
                        p and len(p) > len(of_student[answer]) and p.startswith(of_student[answer]) for p in of_student
                    )
                following = which + 1
                can = following < len(teacher_ids) and draws[following]
                if is_open and left and can and draw == teacher_ids[which]:
                    spread(whole, following, weight / sum(draws[following].values()), left - 1)
                    continue
                masses["open"] += weight * is_open
                if is_open and unresolved == "drop":
                    masses["dropped"] += weight
                    continue
                targets[answer] = targets.get(answer, 0.0) + weight
                masses["accepted"] += weight

        if draws[which]:
            spread(text[: starts_t[which]], which, 1.0, chain)
        total = sum(masses[name] for name in ("accepted", "rejected", "short", "dropped"))
        scale = total / masses["accepted"] if masses["accepted"] else 0
        found.append((token, {t: w * scale for t, w in sorted(targets.items())}, masses))
    return found

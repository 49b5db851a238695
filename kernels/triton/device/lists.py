"""Teachers that list the log-probabilities of some classes. All other classes are one more, the rest.

A divergence is the same over the rest and over its classes, if the teacher's probabilities of these are in proportion
to the student's. So a list stands for logits of all classes: those listed, and the student's plus a constant of the
row. A list has LIST places, ascending by class. Places without an entry, of which the last is one, have class C and
-inf.
"""

import triton
import triton.language as tl

from .bits import in_bits, references_apart
from .divergences import compare
from .inputs import read_exponent
from .margins import LN2, margin_label, spread_of, stand_out
from .memory import columns_of
from .pairs import STUDENT_CHUNK_PAIRS, TEACHER_CHUNK_PAIRS, load_pair, store_pair

# What is written for each row of each teacher with a list: the divergence, the sum of its slopes, the margin, the
# deviation of the log-probabilities, and the distance sum |q - p|.
COMPARED = tl.constexpr(5)


@triton.jit
def find_list(k, row, lists, places, n_rows, LIST: tl.constexpr):
    """The number of teacher k's list, -1 without one for this row; where the entries of the row begin.

    `lists` [2, K]: the numbers, and whether the rest has mass.
    """
    number = tl.load(lists + k).to(tl.int32)
    place = row
    if places is not None:
        place = tl.load(places + k * n_rows + row).to(tl.int64)
        number = tl.where(place < 0, -1, number)
    return number, (number * n_rows + place) * LIST


@triton.jit
def unless_listed(wanted, number):
    """Whether logits are wanted of a teacher that may have a list instead."""
    # In Triton's interpreter, a comparison of float scalars gives a float.
    return (wanted.to(tl.int32) != 0) & (number < 0)


@triton.jit
def find_entries(classes, begin, end, LIST: tl.constexpr):
    """The first and the last place, exclusive, of a list's classes from `begin` to `end`, exclusive."""
    BLOCK: tl.constexpr = LIST if LIST < 256 else 256
    before = tl.zeros((BLOCK,), tl.int32)
    until = before
    for first in range(0, LIST, BLOCK):
        listed = tl.load(classes + first + tl.arange(0, BLOCK))
        before += (listed < begin).to(tl.int32)
        until += (listed < end).to(tl.int32)
    return tl.sum(before, 0), tl.sum(until, 0)


@triton.jit
def rest_logits(number, t, s, start, classes, n_classes, LIST: tl.constexpr):
    """Of a teacher with a list, the student's logits `s` with -inf in the listed classes; otherwise its own, `t`.

    Both are chunks that begin at column `start`.
    """
    if number >= 0:
        t = s
        begin, end = find_entries(classes, start, tl.minimum(start + s.shape[0], n_classes), LIST)
        for i in range(begin, end):
            t = tl.where(columns_of(s, start) == tl.load(classes + i), float("-inf"), t)
    return t


@triton.jit
def listed_bits(number, a, s, start, shift, exponent, classes, bits, n_classes, LIST: tl.constexpr):
    """Of a teacher with a list, the binary logarithms of its probabilities; otherwise its logits in bits, `a`.

    `s`: the student's logits of the same chunk; `shift`: a pair in memory, see :func:`compare_list`.
    """
    if number >= 0:
        top, more = load_pair(shift)
        a = in_bits(s, top, exponent) + more
        begin, end = find_entries(classes, start, tl.minimum(start + s.shape[0], n_classes), LIST)
        for i in range(begin, end):
            a = tl.where(columns_of(s, start) == tl.load(classes + i), tl.load(bits + i), a)
    return a


@triton.jit
def compare_classes(log_p, log_q, mixing, unmixing, DIVERGENCE: tl.constexpr):
    """D(p, q) in nats and the sum of its slopes, from binary logarithms of probabilities; sum |q - p|."""
    p = tl.exp2(log_p)
    q = tl.exp2(log_q)
    if DIVERGENCE == "forward_kl":
        term = tl.where(p == 0, 0.0, LN2 * (log_p - log_q) * p)
        slope = -p
    else:
        term, slope = compare(log_p, log_q, p, q, 0.0, mixing, unmixing, DIVERGENCE)
    return tl.sum(term, 0), tl.sum(slope, 0), tl.sum(tl.abs(q - p), 0)


@triton.jit
def margin_of_list(log_p, listed, target, WEIGHTING: tl.constexpr):
    """The margin within the list; a label outside of it has the probability 0."""
    at_label = listed == target
    at = tl.min(tl.where(at_label, tl.arange(0, log_p.shape[0]), log_p.shape[0]), 0)
    _, own, rest = stand_out(log_p, 0, tl.where(target < 0, target, at))
    return LN2 * own if WEIGHTING == "label_nll" else tl.exp2(own) - tl.exp2(rest)


@triton.jit
def compare_list(
    k, row, logits, rows, listed, between, sizes, numbers,
    WEIGHTING: tl.constexpr, DIVERGENCE: tl.constexpr, CHUNKS: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Compares the list of teacher k, if it has one, with a row of the student.

    `list_bits` gets the binary logarithms of the probabilities at the teacher's temperature, and `normalizers` what
    makes those of the rest out of the student's logits: the largest one, and what to add to a logit less that, in bits.
    """
    student, row_stride, class_stride, _, _, exponents, places = logits
    labels, _, _, _, _ = rows
    lists, list_classes, list_logprobs, list_bits = listed
    fields, normalizers, _, _, compared, _ = between
    n_rows, n_classes, n_teachers, n_chunks = sizes
    exponent, _, _, mixing, unmixing, _, _, _ = numbers
    number, begin = find_list(k, row, lists, places, n_rows, LIST)
    if number >= 0:
        chunks = tl.arange(0, CHUNKS)
        held = chunks < n_chunks
        pair = STUDENT_CHUNK_PAIRS + k * TEACHER_CHUNK_PAIRS
        tops, sums = load_pair(fields + 2 * ((pair * n_rows + row) * n_chunks + chunks), held)
        top = tl.max(tl.where(held, tops, float("-inf")), 0)
        # There may be no class, or all of them at -inf.
        top = tl.where(top == float("-inf"), 0.0, top)
        rest = tl.sum(tl.where(held, sums * tl.exp2(references_apart(tops, top, exponent)), 0.0), 0)
        top_s, inverse_s = load_pair(normalizers + 2 * row)

        at = tl.arange(0, LIST)
        classes = tl.load(list_classes + begin + at)
        logprobs = tl.load(list_logprobs + begin + at)
        exists = logprobs != float("-inf")
        bits = logprobs * read_exponent(exponents, k, exponent)
        has_mass = tl.load(lists + n_teachers + k) > 0
        largest = tl.where(has_mass, 0.0, tl.max(bits, 0))
        total = tl.sum(tl.exp2(bits - largest), 0)
        log_total = tl.where(has_mass, 0.0, largest + tl.log2(total))
        bits -= log_total
        # Rounding may leave a rest where there is no class to have it, or less than none.
        rest_p = tl.where(has_mass, tl.maximum(1 - total, 0.0), 0.0)
        rest_p = tl.where(tl.sum(exists.to(tl.int32), 0) < n_classes, rest_p, 0.0)
        log_rest_p = tl.log2(rest_p)
        log_rest_q = references_apart(top, top_s, exponent) + (tl.log2(rest) + tl.log2(inverse_s))

        where = student + row * row_stride + classes.to(tl.int64) * class_stride
        s = tl.load(where, exists & (classes >= 0) & (classes < n_classes), other=float("-inf")).to(tl.float32)
        is_rest = at == LIST - 1
        log_p = tl.where(is_rest, log_rest_p, bits)
        log_q = tl.where(is_rest, log_rest_q, in_bits(s, top_s, exponent) + tl.log2(inverse_s))
        divergence, slope, distance = compare_classes(log_p, log_q, mixing, unmixing, DIVERGENCE)
        if DIVERGENCE == "tvd":
            # Slopes have the sign of q - p only, which rounding must not give to some classes of the rest.
            log_rest_p += tl.where(log_rest_p > log_rest_q, 1.0, -1.0)
            log_p = tl.where(is_rest, log_rest_p, bits)
            _, slope, _ = compare_classes(log_p, log_q, mixing, unmixing, DIVERGENCE)
        target = n_classes * 0 - 1
        if labels is not None:
            label = tl.load(labels + row)
            target = tl.where((label >= 0) & (label < n_classes), label, -1).to(tl.int32)
        margin = margin_of_list(bits, classes, margin_label(target, WEIGHTING), WEIGHTING)
        count, _mean, squares = spread_of(logprobs, tl.max(logprobs, 0))
        scale = tl.sqrt(squares / tl.maximum(count, 1.0))

        into = compared + COMPARED * (k * n_rows + row)
        tl.store(into, divergence)
        tl.store(into + 1, slope)
        tl.store(into + 2, margin)
        tl.store(into + 3, scale)
        tl.store(into + 4, distance)
        store_pair(
            normalizers + 2 * ((1 + k) * n_rows + row),
            top,
            tl.where(rest == 0, float("-inf"), log_rest_p - tl.log2(rest)),
        )
        tl.store(list_bits + begin + at, bits)

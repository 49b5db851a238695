"""What programs do with one chunk of a row: statistics, the terms of a divergence, and the gradient.

Arguments that all take:

- `row`, `chunk`: which one. Each logit of it is loaded once, by 16 bytes where it can be.
- `logits`: student, its strides, then as in `inputs.py` the teachers, scales, exponents and places.
- `sizes`: rows, classes, teachers, chunks of a row.
- `numbers`: exponent and temperature of the student, sharpness of the margins, mixing and unmixing (`divergences.py`),
  then kd_weight, ce_weight and label_smoothing.
"""

import triton
import triton.language as tl

from .bits import in_bits, relative_sum
from .divergences import compare
from .inputs import load_teacher, read_exponent, read_prior, read_row_inputs
from .lists import find_list, listed_bits, rest_logits, unless_listed
from .margins import margin_label, spread_of, stand_out
from .memory import columns_of, load_tile, place_tile, store_tile
from .pairs import STUDENT_CHUNK_PAIRS, STUDENT_PAIRS, TEACHER_CHUNK_PAIRS, load_pair, store_pair


@triton.jit
def take_statistics(
    row, chunk, logits, rows, lists, fields, sizes, numbers,
    STATS: tl.constexpr, WEIGHTING: tl.constexpr, DIVERGENCE: tl.constexpr, CE: tl.constexpr,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, GROUP: tl.constexpr, CLASSES: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Writes to `fields` the pairs of a chunk, see `pairs.py`, relative to its own largest logits."""
    student, row_stride, class_stride, teachers, scales, exponents, places = logits
    labels, _, prior, ignore_index, unlabeled_index = rows
    list_numbers, list_classes, _, _ = lists
    n_rows, n_classes, n_teachers, n_chunks = sizes
    exponent, temperature, _, _, _, _, _, label_smoothing = numbers
    tile = place_tile(student, row, chunk, row_stride, n_rows, n_classes, GROUP, 1, CLASSES)
    _, _, _, _, inside, _ = tile
    counts, target, _, weight = read_row_inputs(labels, None, row, n_rows, n_classes, ignore_index, unlabeled_index)
    compared = margin_label(target, WEIGHTING)
    plane = 2 * n_rows * n_chunks
    out = fields + 2 * (row * n_chunks + chunk)

    source = (student.to(tl.int64), row_stride, class_stride, 0, weight, weight)
    s, start = load_tile(source, counts, tile, n_classes, STUDENT, GROUP, "")
    if STATS:
        top, own, rest = stand_out(s, start, compared)
        store_pair(out + plane, own, rest)
    else:
        top = tl.max(s, 0)
    # All logits of a chunk may be -inf in a row with finite ones.
    b = in_bits(s, tl.where(top == float("-inf"), 0.0, top), exponent)
    total = tl.sum(tl.exp2(b), 0)
    store_pair(out, top, total)
    has_holes = True
    if DIVERGENCE == "forward_kl":
        has_holes = tl.min(s, 0) == float("-inf")
    if CE:
        if temperature != 1:
            total = tl.sum(tl.exp2(b * temperature), 0)
        mean = 0.0 * total
        if label_smoothing > 0:
            mean = tl.sum(tl.where(inside, b, 0.0), 0)
        store_pair(out + 2 * plane, total, mean)
    out += STUDENT_CHUNK_PAIRS * plane

    for k in range(n_teachers):
        alpha = read_prior(prior, k, row, counts, n_rows)
        exponent_t = read_exponent(exponents, k, exponent)
        wanted = alpha > 0
        if list_numbers is not None:
            number, begin = find_list(k, row, list_numbers, places, n_rows, LIST)
            wanted = unless_listed(wanted, number)
        t, start = load_teacher(
            k, teachers, scales, places, tile, counts, wanted, n_rows, n_classes, n_teachers, TEACHER, GROUP, ""
        )
        if list_numbers is not None:
            t = rest_logits(number, t, s, start, list_classes + begin, n_classes, LIST)
            exponent_t = tl.where(number >= 0, exponent, exponent_t)
        top, own, rest = stand_out(t, start, compared)
        a = in_bits(t, tl.where(top == float("-inf"), 0.0, top), exponent_t)
        e = tl.exp2(a)
        kl = 0.0 * alpha
        if DIVERGENCE == "forward_kl":
            kl = relative_sum(e, a, b, has_holes)
        elif DIVERGENCE == "reverse_kl":
            kl = relative_sum(tl.exp2(b), b, a, tl.min(t, 0) == float("-inf"))
        store_pair(out, top, tl.sum(e, 0))
        store_pair(out + plane, own, rest)
        if STATS:
            count, mean, squares = spread_of(t, top)
            store_pair(out + 2 * plane, kl, squares)
            store_pair(out + 3 * plane, mean, count)
        else:
            store_pair(out + 2 * plane, kl, 0.0 * alpha)
        out += TEACHER_CHUNK_PAIRS * plane


@triton.jit
def compare_chunk(
    row, chunk, logits, rows, lists, normalizers, sums, distances, sizes, numbers,
    DIVERGENCE: tl.constexpr, STUDENT: tl.constexpr, TEACHER: tl.constexpr, GROUP: tl.constexpr, CLASSES: tl.constexpr,
    LIST: tl.constexpr,
):  # fmt: skip
    """The sums of the terms of D and of its slopes, pairs [K, N, chunks, 2]; for the stats sum |q - p|, [K, N, chunks].

    Either may be None. Those of a teacher with a list have no meaning.
    """
    student, row_stride, class_stride, teachers, scales, exponents, places = logits
    labels, _, prior, ignore_index, unlabeled_index = rows
    list_numbers, _, _, _ = lists
    n_rows, n_classes, n_teachers, n_chunks = sizes
    exponent, _, _, mixing, unmixing, _, _, _ = numbers
    tile = place_tile(student, row, chunk, row_stride, n_rows, n_classes, GROUP, 1, CLASSES)
    counts, _, _, _ = read_row_inputs(labels, None, row, n_rows, n_classes, ignore_index, unlabeled_index)
    top, inverse_s = load_pair(normalizers + 2 * row)
    source = (student.to(tl.int64), row_stride, class_stride, 0, top, top)
    s, _ = load_tile(source, counts, tile, n_classes, STUDENT, GROUP, "")
    b = in_bits(s, top, exponent)
    for k in range(n_teachers):
        alpha = read_prior(prior, k, row, counts, n_rows)
        wanted = alpha > 0
        if list_numbers is not None:
            number, _ = find_list(k, row, list_numbers, places, n_rows, LIST)
            wanted = unless_listed(wanted, number)
        top, inverse = load_pair(normalizers + 2 * ((1 + k) * n_rows + row))
        t, _ = load_teacher(
            k, teachers, scales, places, tile, counts, wanted, n_rows, n_classes, n_teachers, TEACHER, GROUP, ""
        )
        a = in_bits(t, top, read_exponent(exponents, k, exponent))
        p = tl.exp2(a) * inverse
        q = tl.exp2(b) * inverse_s
        at = (k * n_rows + row) * n_chunks + chunk
        if sums is not None:
            log_ratio = tl.log2(inverse / inverse_s)
            term, slope = compare(a, b, p, q, log_ratio, mixing, unmixing, DIVERGENCE)
            store_pair(sums + 2 * at, tl.sum(term, 0), tl.sum(slope, 0))
        if distances is not None:
            tl.store(distances + at, tl.sum(tl.abs(q - p), 0))


@triton.jit
def write_gradient(
    row, chunk, logits, labels, lists, normalizers, factors, grad, sizes, numbers,
    DIVERGENCE: tl.constexpr, CE: tl.constexpr,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, GROUP: tl.constexpr, CLASSES: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """The gradient of a chunk, from the factors of its row. Its logits and itself are the first to leave the cache."""
    student, row_stride, class_stride, teachers, scales, exponents, places = logits
    list_numbers, list_classes, _, list_bits = lists
    n_rows, n_classes, n_teachers, _ = sizes
    exponent, temperature, _sharpness, mixing, unmixing, _kd_weight, _ce_weight, label_smoothing = numbers
    tile = place_tile(student, row, chunk, row_stride, n_rows, n_classes, GROUP, 1, CLASSES)
    top, kd_factor = load_pair(factors + 2 * row)
    if DIVERGENCE != "forward_kl":
        slope_factor = top
        top, inverse_s = load_pair(normalizers + 2 * row)
    wanted = kd_factor != 0
    ce_factor = 0.0
    if CE:
        q_factor, ce_factor = load_pair(factors + 2 * (n_rows + row))
        wanted |= ce_factor != 0
    source = (student.to(tl.int64), row_stride, class_stride, 0, top, top)
    s, start_s = load_tile(source, wanted, tile, n_classes, STUDENT, GROUP, "evict_first")
    b = in_bits(s, top, exponent)
    g = tl.zeros(s.shape, tl.float32)
    # A factor of 0 stands for no teacher and no label, whose logits may be NaN.
    if kd_factor != 0:
        g = tl.exp2(b) * kd_factor if DIVERGENCE == "forward_kl" else -tl.exp2(b) * inverse_s * slope_factor
    for k in range(n_teachers):
        top, factor = load_pair(factors + 2 * ((STUDENT_PAIRS + k) * n_rows + row))
        taught = factor != 0
        if taught:
            wanted = taught
            if list_numbers is not None:
                number, begin = find_list(k, row, list_numbers, places, n_rows, LIST)
                wanted = unless_listed(taught, number)
            t, start = load_teacher(
                k, teachers, scales, places, tile, taught, wanted, n_rows, n_classes, n_teachers, TEACHER, GROUP,
                "evict_first",
            )  # fmt: skip
            exponent_t = read_exponent(exponents, k, exponent)
            if DIVERGENCE != "forward_kl":
                top, inverse = load_pair(normalizers + 2 * ((1 + k) * n_rows + row))
            a = in_bits(t, top, exponent_t)
            if list_numbers is not None:
                shift = normalizers + 2 * ((1 + k) * n_rows + row)
                a = listed_bits(
                    number, a, s, start, shift, exponent, list_classes + begin, list_bits + begin, n_classes, LIST
                )
                if DIVERGENCE != "forward_kl":
                    inverse = tl.where(number >= 0, 1.0, inverse)
            if DIVERGENCE == "forward_kl":
                # Student and teachers have the same order of operations: 0 where they are equal.
                g -= tl.exp2(a) * factor
            else:
                log_ratio = tl.log2(inverse / inverse_s)
                p = tl.exp2(a) * inverse
                q = tl.exp2(b) * inverse_s
                _term, slope = compare(a, b, p, q, log_ratio, mixing, unmixing, DIVERGENCE)
                g += slope * factor
    if CE and ce_factor != 0:
        g += tl.exp2(b * temperature) * q_factor - ce_factor * (label_smoothing / n_classes)
        label = tl.load(labels + row).to(tl.int32)
        if (label >= start_s) & (label < start_s + s.shape[0]):
            g -= tl.where(columns_of(s, start_s) == label, ce_factor * (1 - label_smoothing), 0.0)
    store_tile(grad, g, tile, n_classes, GROUP, "evict_first")

"""Top fractions of tokens in Triton: exactly so many of a response, a group or the batch, of equal ones the first.

A response's program selects within it. Among several responses a launch per digit of the order keys adds up, in
integers, how often each digit occurs; all programs then choose the same digit. Of tokens with the last selected key
those are taken that come first, so each program needs to know how many lie in earlier responses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vgpo_kernels.reference import token_shaping as reference
from vgpo_kernels.triton_kernels.common import double_from_bits, token_range
from vgpo_kernels.triton_kernels.responses import choose_digit, order_key

COUNT_SLACK = tl.constexpr(reference.COUNT_SLACK)

# Columns of the counts of a response, int32 [B, COUNTS].
COUNTS = tl.constexpr(8)
START = tl.constexpr(0)  # position of its first token that counts
LENGTH = tl.constexpr(1)  # how many tokens count; 0 for a response that is left as it is
BROKEN = tl.constexpr(2)  # 1 where a signal is not finite
BY_SCORE = tl.constexpr(3)  # tokens selected for their visual score
SELECTED = tl.constexpr(4)  # tokens selected for either
SEGMENT = tl.constexpr(5)  # of the histograms: the first response of its group, or 0 for the batch

# Bits of a token's mark.
FOR_SCORE = tl.constexpr(1)  # selected for its visual score
FOR_ENTROPY = tl.constexpr(2)

DIGITS = tl.constexpr(4)  # of a key
DIGIT_VALUES = tl.constexpr(256)
RESPONSES = tl.constexpr(128)  # that a program looks at at a time


@triton.jit
def top_count(number, fraction_bits):
    """How many the top fraction of a number are, in fp64 as in the reference implementation."""
    exact = number.to(tl.float64) * double_from_bits(fraction_bits)
    return tl.maximum(tl.ceil(exact - COUNT_SLACK).to(tl.int32), 1)


@triton.jit
def digit_histogram(values, mask, start, size, leading, known, shift, BLOCK: tl.constexpr):
    """How often each digit occurs at ``shift`` among the keys of a response whose ``known`` bits are ``leading``."""
    histogram = tl.zeros((DIGIT_VALUES,), tl.int32)
    for block in range(start, size, BLOCK):
        token = block + tl.arange(0, BLOCK)
        valid = tl.load(mask + token, mask=token < size, other=0) != 0
        key = order_key(tl.load(values + token, mask=valid, other=0.0))
        histogram += tl.histogram(
            ((key >> shift) & 255).to(tl.int32), DIGIT_VALUES, mask=valid & ((key & known) == leading)
        )
    return histogram


@triton.jit
def shift_of(step):
    return tl.zeros((), tl.uint32) + (24 - 8 * step)


@triton.jit
def last_selected(values, mask, start, size, wanted, BLOCK: tl.constexpr):
    """Key of the ``wanted``-th largest value of a response, and how many of equal ones are among the ``wanted``."""
    threshold = tl.zeros((), tl.uint32)
    known = tl.zeros((), tl.uint32)
    for step in range(DIGITS):
        shift = shift_of(step)
        histogram = digit_histogram(values, mask, start, size, threshold, known, shift, BLOCK)
        chosen, above = choose_digit(histogram, wanted)
        wanted -= above
        threshold |= chosen.to(tl.uint32) << shift
        known |= tl.full((), 255, tl.uint32) << shift
    return threshold, wanted


@triton.jit
def last_selected_so_far(histograms, plane, fraction_bits, steps):
    """What :func:`last_selected` finds, of the first digits, from the histograms of a segment, ``plane`` apart.

    Also returns which bits those digits are.
    """
    threshold = tl.zeros((), tl.uint32)
    known = tl.zeros((), tl.uint32)
    wanted = tl.zeros((), tl.int32)
    for step in range(steps):
        histogram = tl.load(histograms + step * plane + tl.arange(0, DIGIT_VALUES))
        wanted = tl.where(step == 0, top_count(tl.sum(histogram), fraction_bits), wanted)
        shift = shift_of(step)
        chosen, above = choose_digit(histogram, wanted)
        wanted -= above
        threshold |= chosen.to(tl.uint32) << shift
        known |= tl.full((), 255, tl.uint32) << shift
    return threshold, known, wanted


@triton.jit
def add_digits(values, mask, start, size, histograms, own, plane, step, fraction_bits, BLOCK: tl.constexpr):
    """Add a response's digits to its segment's histogram of this step, and keep them in ``own``."""
    leading, known, _ = last_selected_so_far(histograms, plane, fraction_bits, step)
    histogram = digit_histogram(values, mask, start, size, leading, known, shift_of(step), BLOCK)
    digit = tl.arange(0, DIGIT_VALUES)
    tl.atomic_add(histograms + step * plane + digit, histogram, mask=histogram > 0, sem="relaxed")
    tl.store(own + digit, histogram)


@triton.jit
def last_selected_of_segment(histograms, plane, fraction_bits, last_digits, counts, response, segment):
    """The last selected key of a segment, and how many equal ones are taken from this response on."""
    threshold, _, ties = last_selected_so_far(histograms, plane, fraction_bits, DIGITS)
    digit = (threshold & 255).to(tl.int32)
    earlier = tl.zeros((RESPONSES,), tl.int32)
    for start in range(0, response, RESPONSES):
        other = (start + tl.arange(0, RESPONSES)).to(tl.int64)
        joined = other < response
        joined = joined & (tl.load(counts + other * COUNTS + SEGMENT, mask=joined, other=-1) == segment)
        earlier += tl.load(last_digits + other * DIGIT_VALUES + digit, mask=joined, other=0)
    return threshold, ties - tl.sum(earlier)


@triton.jit
def is_selected(values, token, valid, threshold, ties):
    """Which tokens of a block are selected, and how many ties are left for later blocks."""
    key = order_key(tl.load(values + token, mask=valid, other=0.0))
    equal = valid & (key == threshold)
    taken = equal & (tl.cumsum(equal.to(tl.int32), 0) <= ties)
    return (valid & (key > threshold)) | taken, ties - tl.sum(equal.to(tl.int32))


@triton.jit
def mark_tokens(
    scores,
    entropy,
    mask,
    marks,
    row,  # of counts
    start,
    size,
    score_threshold,
    score_ties,
    entropy_threshold,
    entropy_ties,
    TOP_VISUAL: tl.constexpr,
    TOP_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mark the tokens of a response that are selected, and count them."""
    by_score = tl.zeros((BLOCK,), tl.int32)
    selected = tl.zeros((BLOCK,), tl.int32)
    for block in range(start, size, BLOCK):
        token = block + tl.arange(0, BLOCK)
        valid = tl.load(mask + token, mask=token < size, other=0) != 0
        mark = tl.zeros((BLOCK,), tl.int32)
        if TOP_VISUAL:
            chosen, score_ties = is_selected(scores, token, valid, score_threshold, score_ties)
            mark += tl.where(chosen, FOR_SCORE, 0)
            by_score += chosen.to(tl.int32)
        if TOP_ENTROPY:
            chosen, entropy_ties = is_selected(entropy, token, valid, entropy_threshold, entropy_ties)
            mark += tl.where(chosen, FOR_ENTROPY, 0)
        selected += (mark != 0).to(tl.int32)
        tl.store(marks + token, mark.to(tl.uint8), mask=valid)
    tl.store(row + BY_SCORE, tl.sum(by_score))
    tl.store(row + SELECTED, tl.sum(selected))


@triton.jit
def select_in_response(
    scores,
    entropy,
    mask,
    marks,
    row,
    start,
    size,
    length,
    visual_bits,
    entropy_bits,
    TOP_VISUAL: tl.constexpr,
    TOP_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mark the top fractions of a response of ``length`` tokens that count."""
    score_threshold = tl.zeros((), tl.uint32)
    score_ties = tl.zeros((), tl.int32)
    entropy_threshold, entropy_ties = score_threshold, score_ties
    if TOP_VISUAL:
        score_threshold, score_ties = last_selected(scores, mask, start, size, top_count(length, visual_bits), BLOCK)
    if TOP_ENTROPY:
        entropy_threshold, entropy_ties = last_selected(
            entropy, mask, start, size, top_count(length, entropy_bits), BLOCK
        )
    mark_tokens(
        *(scores, entropy, mask, marks, row, start, size),
        *(score_threshold, score_ties, entropy_threshold, entropy_ties),
        *(TOP_VISUAL, TOP_ENTROPY, BLOCK),
    )


@triton.jit
def counted_tokens(counts, boundaries, response, tokens):
    """Begin of a response, where its tokens that count start and end, counted from there, and its row of counts."""
    begin, end = token_range(boundaries, response, tokens)
    row = counts + response.to(tl.int64) * COUNTS
    size = tl.where(tl.load(row + LENGTH) > 0, (end - begin).to(tl.int32), 0)
    return begin, tl.load(row + START), size, row


@triton.jit(do_not_specialize=["batch", "tokens", "segments", "step", "visual_bits", "entropy_bits"])
def digit_kernel(
    scores,  # [B, T] or [N]
    entropy,  # scores' shape, or None
    mask,
    boundaries,  # [B + 1] or None
    counts,  # [B, COUNTS]
    histograms,  # in and out: [selections, DIGITS, segments, DIGIT_VALUES]
    last_digits,  # out: [selections, B, DIGIT_VALUES], of each response at this step
    batch,
    tokens,
    segments,
    step,  # which digit, of the highest bits first
    visual_bits,  # the bits of a double, as those that follow
    entropy_bits,
    TOP_VISUAL: tl.constexpr,
    TOP_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    response = tl.program_id(0)
    begin, start, size, row = counted_tokens(counts, boundaries, response, tokens)
    plane = segments.to(tl.int64) * DIGIT_VALUES
    histograms += tl.load(row + SEGMENT).to(tl.int64) * DIGIT_VALUES
    last_digits += response.to(tl.int64) * DIGIT_VALUES
    if TOP_VISUAL:
        add_digits(
            *(scores + begin, mask + begin, start, size, histograms, last_digits, plane, step, visual_bits, BLOCK)
        )
        histograms += DIGITS * plane
        last_digits += batch.to(tl.int64) * DIGIT_VALUES
    if TOP_ENTROPY:
        add_digits(
            *(entropy + begin, mask + begin, start, size, histograms, last_digits, plane, step, entropy_bits, BLOCK)
        )


@triton.jit(do_not_specialize=["batch", "tokens", "segments", "visual_bits", "entropy_bits"])
def mark_kernel(
    scores,  # as digit_kernel's
    entropy,
    mask,
    boundaries,
    counts,  # in and out
    histograms,
    last_digits,
    marks,  # out: uint8, scores' shape
    batch,
    tokens,
    segments,
    visual_bits,
    entropy_bits,
    TOP_VISUAL: tl.constexpr,
    TOP_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    response = tl.program_id(0)
    begin, start, size, row = counted_tokens(counts, boundaries, response, tokens)
    plane = segments.to(tl.int64) * DIGIT_VALUES
    segment = tl.load(row + SEGMENT)
    histograms += segment.to(tl.int64) * DIGIT_VALUES
    score_threshold = tl.zeros((), tl.uint32)
    score_ties = tl.zeros((), tl.int32)
    entropy_threshold, entropy_ties = score_threshold, score_ties
    if TOP_VISUAL:
        score_threshold, score_ties = last_selected_of_segment(
            histograms, plane, visual_bits, last_digits, counts, response, segment
        )
        histograms += DIGITS * plane
        last_digits += batch.to(tl.int64) * DIGIT_VALUES
    if TOP_ENTROPY:
        entropy_threshold, entropy_ties = last_selected_of_segment(
            histograms, plane, entropy_bits, last_digits, counts, response, segment
        )
        entropy += begin
    mark_tokens(
        *(scores + begin, entropy, mask + begin, marks + begin, row, start, size),
        *(score_threshold, score_ties, entropy_threshold, entropy_ties),
        *(TOP_VISUAL, TOP_ENTROPY, BLOCK),
    )

"""The LM head in chunks: log-probabilities, entropies and gradients, without all logits at the same time.

A chunk is some tokens by some entries of the vocabulary, and its logits fit a workspace of ``chunk_bytes``. The outer
loop is over the vocabulary, the inner loop over tokens. So the gradient w.r.t. a slice of the weight is summed over all
tokens in fp32 before it is rounded, and a weight in bf16 needs no fp32 gradient of its whole size.

Where chunks end follows from the sizes of a call, ``chunk_bytes`` and the device. Another number of rows may therefore
change the last bits of a row's results; the same call gives the same bits.

On a Hopper GPU the statistics need no chunks: a kernel computes the logits in tiles that never leave its registers.
What it computes of a row depends on no other row.

The backends implement the arithmetic of one chunk (:class:`HeadKernels`). Everything here is the same for all of them,
and runs inside opaque operators, where shapes may depend on data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property, lru_cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vgpo_kernels import checks, extension
from vgpo_kernels.ops import registry
from vgpo_kernels.reference.linear_logprob import columns_of, gradient_of, is_distribution
from vgpo_kernels.reference.logits import LogitMap
from vgpo_kernels.reference.truncation import Truncation

# The default workspace is this share of the fp32 logits, in bounds. With what 16-bit gradients need beside it (their
# sums in fp32, and on CPUs packed copies) peak memory stays at about an eighth of the logits.
LOGITS_SHARE = {"cpu": 24, "cuda": 16}
# In one sweep every chunk adds to the gradient w.r.t. the whole weight, so fewer and larger chunks are faster: on GPUs
# by so much that the gradient's traffic stays below the time of the products.
SWEEP_SHARE = {"cpu": 8, "cuda": 4}
# Of the size of a row's logits, what a sampler's cut takes beside them: sorted ones, their indices, shares in fp64.
TRUNCATION_COPIES = 10
LEAST_CHUNK = 4 * 2**20
# Every chunk of a sweep reads and writes the gradient w.r.t. the whole weight: below this size a CPU waits for it.
LEAST_SWEEP = {"cpu": 64 * 2**20}
MOST_CHUNK = {"cpu": 256 * 2**20, "cuda": 1024 * 2**20}
# Entries of the vocabulary that a chunk should have at least, so that reading its tokens costs little beside them.
CHUNK_COLUMNS = 1024
# Widths that suit every matrix unit.
COLUMN_MULTIPLE = 64
# What a block of a GPU's matrix product computes at a time: rows by columns.
TILE_ROWS, TILE_COLUMNS = 128, 256
# Rows that two blocks of the kernel in tiles compute together.
CLUSTER_ROWS = 256
# What a chunk costs beside its products, in the time that every multiprocessor takes for a tile: to start and to end.
CHUNK_TILES = 0.25

# With fp16 the coefficients of a gradient are scaled to this magnitude: probabilities below 1e-10 still count then,
# and sums of thousands of rows do not overflow.
HALF_MAGNITUDE = 2.0**10


def no_tiles(hidden: Tensor, weight: Tensor, has_bias: bool) -> int:
    """Stand for a backend that computes nothing in tiles, as :class:`HeadKernels` asks."""
    return 0


class HeadKernels(NamedTuple):
    """The arithmetic of a chunk, as a backend implements the operators of the same names.

    Attributes:
        statistics: ``head_statistics``.
        gradient: ``head_gradient``.
        product: ``head_product``.
        policy_loss: ``policy_loss``.
        half: Whether ``product`` multiplies fp16 as it is; otherwise hidden states in fp16 are computed in fp32.
        packs: Whether ``product`` packs bf16 matrices for a CPU's matrix units. A sweep would pack the whole weight
            for every chunk, which takes longer than to compute the logits a second time.
        tile_columns: Of hidden, weight, and whether there is a bias: 0, or the columns of the narrow workspace with
            which ``statistics`` computes them in tiles, without a place for logits.

    """

    statistics: Callable[..., None]
    gradient: Callable[..., None]
    product: Callable[..., None]
    policy_loss: Callable[..., Any]
    half: bool
    packs: bool
    tile_columns: Callable[[Tensor, Tensor, bool], int] = no_tiles


def in_fp32(reference: Callable[..., None]) -> Callable[..., None]:
    """Return the arithmetic of a chunk as its reference implementation in fp32, for devices without kernels."""
    return partial(reference, dtype=torch.float32)


def has_kernels(device: torch.device) -> bool:
    """Whether the extension computes heads on a device itself."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key("vgpo_kernels::head_statistics", key)


def compiled_kernels(device: torch.device) -> HeadKernels:
    """Return the kernels of the extension, C++ on the CPU and CUDA on a GPU, or plain PyTorch where it has none."""
    ops = torch.ops.vgpo_kernels
    compiled = has_kernels(device)
    on_gpu = compiled and device.type == "cuda"
    return HeadKernels(
        ops.head_statistics.default,
        ops.head_gradient.default,
        ops.head_product.default,
        ops.policy_loss.default,
        half=on_gpu,
        packs=compiled and not on_gpu,
        tile_columns=import_module(extension.NAME).head_tile_columns if on_gpu else no_tiles,
    )


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Turn autocast off: the public functions have already converted hidden states to its dtype."""
    return registry.without_autocast(tensor.device)


def chunk_elements(chunk_bytes: int, rows: int, weight: Tensor, *, sweep: bool = False) -> int:
    """Return how many fp32 logits a workspace holds; ``chunk_bytes`` 0 takes the device's share of them, in bounds.

    With ``sweep`` it is to hold whole rows, for :meth:`Head.sweep`.
    """
    if chunk_bytes == 0:
        logits, device = 4 * rows * weight.shape[0], weight.device.type
        shares = SWEEP_SHARE if sweep else LOGITS_SHARE
        share = shares.get(device, shares["cpu"])
        least = LEAST_SWEEP.get(device, LEAST_CHUNK) if sweep else LEAST_CHUNK
        chunk_bytes = min(max(logits // share, least), MOST_CHUNK.get(device, MOST_CHUNK["cpu"]))
    return max(chunk_bytes // 4, 1)


def at_rows(found: Tensor, index: Tensor | None, number: int) -> Tensor:
    """Return results ``[R, n]`` of the rows at ``index`` among those of ``number`` rows, zeros elsewhere."""
    if index is None:
        return found
    everything = found.new_zeros((found.shape[0], number))
    everything[:, index] = found
    return everything


def kept_rows(targets: Tensor, ignore_index: int | None) -> Tensor | None:
    """Return the indices of rows to compute, or ``None``: all."""
    if ignore_index is None:
        return None
    index = (targets != ignore_index).nonzero().squeeze(-1)
    return None if index.shape == targets.shape else index


@lru_cache
def whole_waves(most: int, rows: int, vocabulary: int, multiprocessors: int) -> int:
    """Return how many columns a GPU's chunks should have, up to ``most``, so that few multiprocessors stay idle.

    A matrix product is computed in tiles, one a multiprocessor at a time. If a chunk has a tile more than they take in
    so many turns, all but one of them wait for a turn. Columns may be as few as half of ``most``.
    """
    row_tiles = -(-rows // TILE_ROWS)

    def turns(columns: int) -> int:
        return -(-row_tiles * -(-columns // TILE_COLUMNS) // multiprocessors)

    def cost(columns: int) -> float:
        chunks, rest = divmod(vocabulary, columns)
        return chunks * turns(columns) + turns(rest) + CHUNK_TILES * (chunks + (rest > 0))

    candidates: list[int] = [most, *range(most // TILE_COLUMNS * TILE_COLUMNS, most // 2, -TILE_COLUMNS)]
    return min(candidates, key=cost)  # of equal ones the first: the most columns


def slices(length: int, size: int) -> Iterator[slice]:
    """Cut ``[0, length)`` into slices of at most ``size``."""
    for begin in range(0, length, size):
        yield slice(begin, min(begin + size, length))


def rounded_down(value: int, multiple: int) -> int:
    """Round down to a multiple, or leave a value below it as it is."""
    return value // multiple * multiple if value >= multiple else max(value, 1)


def tile_columns(kernels: HeadKernels, hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_map: LogitMap) -> int:
    """Return the columns of the workspace with which tiles compute the statistics; 0 where they cannot."""
    if logit_map.softcap or logit_map.temperatures is not None:
        return 0
    return kernels.tile_columns(hidden, weight, bias is not None)


class Head:
    """The rows of one call before an LM head, and the workspace that their logits pass through.

    Args:
        kernels: The backend's arithmetic.
        hidden: Rows to compute, ``[N, D]``.
        weight: Rows ``first`` to ``first + V`` of the head's weight, ``[V, D]``, in any floating dtype: converted to
            hidden's, a slice at a time.
        bias: ``[V]`` fp32 or ``None``.
        targets: Ids in the whole vocabulary, int64 ``[N]``. Kept as places among the weight's rows, -1 for others.
        first: Where the weight's rows begin in the vocabulary.
        logit_map: How products become logits.
        elements: fp32 numbers that the workspace may hold.
        whole_rows: Make the workspace hold rows of V logits, at least one, for :meth:`sweep` and :meth:`truncated`.

    """

    def __init__(
        self,
        kernels: HeadKernels,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        first: int,
        logit_map: LogitMap,
        elements: int,
        *,
        whole_rows: bool = False,
    ) -> None:
        self.kernels = kernels
        computed = torch.float32 if hidden.dtype == torch.float16 and not kernels.half else hidden.dtype
        # Rows that were chosen by an index lie as those of the whole tensor do: transposed, for instance.
        self.hidden = checks.rows_apart(hidden.to(computed))
        self.weight = weight
        self.bias = bias
        self.targets = columns_of(targets, first, weight.shape[0])
        self.logit_map = logit_map
        rows, size = hidden.shape
        vocabulary = max(weight.shape[0], 1)
        on_gpu = hidden.device.type == "cuda"
        # A slice of the weight that is converted, or its gradient in fp32, must fit a workspace, too. On a GPU it may
        # be a share of the weight instead: few rows take many columns to keep every multiprocessor busy.
        columns = max(elements // max(size, 1), CHUNK_COLUMNS, vocabulary // LOGITS_SHARE["cuda"] if on_gpu else 0)
        if whole_rows and on_gpu and weight.dtype == computed:
            columns = vocabulary  # nothing is converted, and the gradient has a place for every slice at once
        if not whole_rows:
            columns = min(max(elements // max(rows, 1), CHUNK_COLUMNS), columns, elements)
        self.columns = vocabulary if columns >= vocabulary else rounded_down(columns, COLUMN_MULTIPLE)
        if on_gpu:
            together = max(min(elements // (vocabulary if whole_rows else self.columns), rows), 1)
            multiprocessors = torch.cuda.get_device_properties(hidden.device).multi_processor_count
            self.columns = whole_waves(self.columns, together, vocabulary, multiprocessors)
        width = vocabulary if whole_rows else self.columns
        self.rows = max(min(elements // width, rows), 1)
        self.elements = elements
        self.width = width

    def weight_slices(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yield the columns of each slice of the vocabulary, its weight in hidden's dtype, and its bias."""
        for columns in slices(self.weight.shape[0], self.columns):
            weight = self.weight[columns].to(self.hidden.dtype)
            yield columns, weight, None if self.bias is None else self.bias[columns]

    @cached_property
    def workspace(self) -> Tensor:
        return self.hidden.new_empty(self.rows * self.width, dtype=torch.float32)

    def logits(self, rows: int, columns: int) -> Tensor:
        """Return the workspace as fp32 logits ``[rows, columns]``."""
        return self.workspace[: rows * columns].view(rows, columns)

    def statistics(self, *, squares: bool = False, products: Tensor | None = None) -> Tensor:
        """Maximum, log-sum, target and mean of every row, ``[4, N]``, as ``linear_logprob`` defines them.

        Args:
            squares: Return ``[5, N]``: the sum of squared probabilities, too.
            products: ``[N, V]``, where the products are written for :meth:`gradients`; ``None``: they are not kept.

        """
        running = new_statistics(self.hidden, squares=squares)
        tiles = tile_columns(self.kernels, self.hidden, self.weight, self.bias, self.logit_map)
        if tiles and not squares and products is None:
            for rows in slices(self.hidden.shape[0], rounded_down(max(self.elements // tiles, 1), CLUSTER_ROWS)):
                parts = self.hidden.new_empty((rows.stop - rows.start, tiles), dtype=torch.float32)
                self._statistics(rows, 0, self.weight, None, running[:, rows], parts, keep=False)
            return finished(running)
        for columns, weight, bias in self.weight_slices():
            for rows in slices(self.hidden.shape[0], self.rows):
                logits = self.logits(rows.stop - rows.start, weight.shape[0])
                keep = products is not None
                self._statistics(rows, columns.start, weight, bias, running[:, rows], logits, keep=keep)
                if products is not None:
                    products[rows, columns] = logits
        return finished(running)

    def truncated(self, truncation: Truncation, *, squares: bool = False) -> Tensor:
        """Return the statistics, and what a sampler keeps below them (:meth:`Truncation.kept`), of whole rows."""
        found = []
        for rows in slices(self.hidden.shape[0], self.rows):
            statistics, logits = self._whole_rows(rows, squares=squares)
            logits = self.logit_map.of_rows(rows).logits(logits, self.bias)
            found.append(torch.cat([statistics, truncation.kept(logits, self.targets[rows].clamp(min=0))]))
        return torch.cat(found, -1) if found else self.hidden.new_empty((6 + squares, 0), dtype=torch.float32)

    def _whole_rows(self, rows: slice, *, squares: bool = False) -> tuple[Tensor, Tensor]:
        """Return the statistics of some rows, and all their products in the workspace."""
        hidden = self.hidden[rows]
        logits = self.logits(hidden.shape[0], self.weight.shape[0])
        running = new_statistics(hidden, squares=squares)
        for columns, weight, bias in self.weight_slices():
            self._statistics(rows, columns.start, weight, bias, running, logits[:, columns], keep=True)
        return finished(running), logits

    def gradients(
        self,
        statistics: Tensor,
        grad_statistics: Tensor,
        gradients: list[bool],
        weight_dtype: torch.dtype,
        products: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients w.r.t. the rows (fp32), the weight (``weight_dtype``) and the bias (fp32), where asked for.

        ``products`` are those that :meth:`statistics` kept; without them they are computed again.
        """
        if not self.hidden.shape[0]:
            return new_gradients(self.hidden, self.weight, gradients, weight_dtype)
        coefficients, factor = self._coefficients(slice(None), statistics, grad_statistics)
        sums = GradientSums(self, gradients[:1], gradients[1], gradients[2], weight_dtype, factor)
        for columns, weight, bias in self.weight_slices():
            for rows in slices(self.hidden.shape[0], self.rows):
                logits = self.logits(rows.stop - rows.start, weight.shape[0])
                if products is not None:
                    logits.copy_(products[rows, columns])
                recompute = products is None
                self._gradient(rows, columns.start, weight, bias, coefficients[:, rows], logits, recompute=recompute)
                sums.add(gradient_of(logits, self.hidden.dtype), rows, columns, weight)
        return sums.finished()[0], sums.by_weight, sums.by_bias

    def sweep(
        self, loss_gradient: Callable[[slice, Tensor], Tensor], gradients: list[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients, all in fp32, of a loss whose gradient at a row needs no other row's statistics.

        Every logit is computed once: the logits of a chunk are kept until their gradient overwrites them. The cost is
        an fp32 gradient w.r.t. the whole weight.

        Args:
            loss_gradient: Returns the gradient w.r.t. the statistics ``[4, n]`` of the rows of a slice.
            gradients: Whether to compute the gradients w.r.t. hidden, the weight and the bias.

        """
        sums = GradientSums(self, gradients[:1], gradients[1], gradients[2], torch.float32, None)
        for rows in slices(self.hidden.shape[0], self.rows):
            statistics, logits = self._whole_rows(rows)
            grad_statistics = loss_gradient(rows, statistics)
            coefficients, _ = self._coefficients(rows, statistics, grad_statistics)
            for columns, weight, bias in self.weight_slices():
                part = logits[:, columns]
                self._gradient(rows, columns.start, weight, bias, coefficients, part, recompute=False)
                sums.add(gradient_of(part, self.hidden.dtype), rows, columns, weight)
        return sums.finished()[0], sums.by_weight, sums.by_bias

    def _coefficients(self, rows: slice, statistics: Tensor, grad_statistics: Tensor) -> tuple[Tensor, Tensor | None]:
        own, divisor = self.targets[rows] >= 0, self.logit_map.of_rows(rows).divisor()
        return gradient_coefficients(statistics, grad_statistics, own, divisor, self.hidden.dtype)

    def _statistics(
        self,
        rows: slice,
        first: int,
        weight: Tensor,
        bias: Tensor | None,
        running: Tensor,
        logits: Tensor,
        *,
        keep: bool,
    ) -> None:
        logit_map = self.logit_map.of_rows(rows)
        self.kernels.statistics(
            self.hidden[rows], weight, bias, self.targets[rows], first, *logit_map, running, logits, keep
        )

    def _gradient(
        self,
        rows: slice,
        first: int,
        weight: Tensor,
        bias: Tensor | None,
        coefficients: Tensor,
        logits: Tensor,
        *,
        recompute: bool,
    ) -> None:
        logit_map = self.logit_map.of_rows(rows)
        self.kernels.gradient(
            self.hidden[rows], weight, bias, self.targets[rows], first, *logit_map, coefficients, logits, recompute
        )


class GradientSums:
    """Gradients w.r.t. the rows (fp32), the weight and the bias (fp32) of one head, as chunks add to them.

    Args:
        head: The head. Its rows are those of one view, or of several in turn, as many as there are ``views``.
        views: Whether the gradient w.r.t. each view's rows is asked for.
        by_weight: Whether that w.r.t. the weight is.
        by_bias: Whether that w.r.t. the bias is.
        weight_dtype: Of the weight's gradient.
        factor: What the chunks' gradients are too large by; ``None``: nothing.

    """

    def __init__(
        self,
        head: Head,
        views: list[bool],
        by_weight: bool,
        by_bias: bool,
        weight_dtype: torch.dtype,
        factor: Tensor | None,
    ) -> None:
        self.head = head
        self.views = views
        self.factor = factor
        # Rows of the views that are asked for: all of a pair's, or one.
        self.first, self.step = (0, 1) if all(views) else (views.index(True) if any(views) else 0, len(views))
        rows = head.hidden[self.first :: self.step]
        self.by_rows, self.by_weight, self.by_bias = new_gradients(
            rows, head.weight, [any(views), by_weight, by_bias], weight_dtype
        )
        self._of_slice: Tensor | None = None

    def add(self, gradient: Tensor, tokens: slice, columns: slice, weight: Tensor) -> None:
        """Add the products with a chunk's gradient w.r.t. its logits; the first chunk of a sum overwrites.

        A weight that is not fp32 has its sums rounded after the last tokens, so these are the inner loop.
        """
        product, number = self.head.kernels.product, len(self.views)
        rows = slice(number * tokens.start, number * tokens.stop)
        if self.by_rows is not None:
            wide = number // self.step
            part = self.by_rows[wide * tokens.start : wide * tokens.stop]
            product(gradient[self.first :: self.step], weight, part, columns.start > 0)
        if self.by_weight is not None:
            exact = self.by_weight.dtype == torch.float32
            if exact:
                self._of_slice = self.by_weight[columns]
            elif tokens.start == 0:
                self._of_slice = torch.empty_like(weight, dtype=torch.float32)
            assert self._of_slice is not None
            product(gradient.T, self.head.hidden[rows], self._of_slice, tokens.start > 0)
            if rows.stop == self.head.hidden.shape[0]:
                if self.factor is not None:
                    self._of_slice *= self.factor
                if not exact:
                    self.by_weight[columns] = self._of_slice
        if self.by_bias is not None:
            self.by_bias[columns] += gradient.sum(0, dtype=torch.float32)

    def finished(self) -> list[Tensor | None]:
        """Return the gradient w.r.t. each view's rows, where it is asked for."""
        for sums in (self.by_rows, self.by_bias):
            if sums is not None and self.factor is not None:
                sums *= self.factor
        if self.by_rows is None:
            return [None for _ in self.views]
        parts = iter(self.by_rows.view(-1, len(self.views) // self.step, self.by_rows.shape[1]).unbind(1))
        return [next(parts) if asked else None for asked in self.views]


def new_statistics(hidden: Tensor, *, squares: bool = False) -> Tensor:
    """Return running statistics ``[4, N]``, with squares ``[5, N]``, before the first entry of the vocabulary."""
    running = hidden.new_zeros((4 + squares, hidden.shape[0]), dtype=torch.float32)
    running[:4:3] = -torch.inf
    return running


def finished(running: Tensor) -> Tensor:
    """Turn running statistics into what ``linear_logprob`` returns: relative to the maximum, which is more precise."""
    maximum, total, weighted, target, *squares = running
    # Without a logit above minus infinity there is no distance. (A NaN among them makes the total NaN.)
    nothing = total == 0
    distance = torch.where(nothing, -torch.inf, target - maximum)
    shares = [torch.where(nothing, 0.0, value / total) for value in (weighted, *(one / total for one in squares))]
    return torch.stack([maximum, total.log(), distance, *shares])


def new_gradients(
    hidden: Tensor, weight: Tensor, gradients: list[bool], weight_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Allocate the gradients that are asked for, as zeros where there is no chunk to write them."""
    empty = hidden.shape[0] == 0 or weight.shape[0] == 0
    allocate = torch.zeros if empty else torch.empty
    device = hidden.device
    by_hidden = allocate(hidden.shape, dtype=torch.float32, device=device) if gradients[0] else None
    by_weight = allocate(weight.shape, dtype=weight_dtype, device=device) if gradients[1] else None
    by_bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=device) if gradients[2] else None
    return by_hidden, by_weight, by_bias


def gradient_coefficients(
    statistics: Tensor,  # [4, N]
    grad_statistics: Tensor,  # [4, N]
    own: Tensor,  # [N], whether the target is in this slice of the vocabulary
    divisor: float | Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Return ``head_gradient``'s coefficients ``[5, N]``, and the factor to multiply its results by (``None``: 1).

    With p the probabilities and z - m the logits minus their maximum, the gradient w.r.t. a chunk's logits is
    ``p grad_log_sum + p (1 + z - m - mean) grad_mean``, plus ``grad_target`` at the target. Written in the
    log-probability ``x = z - m - log_sum``, it is ``exp(x) (scale + slope x)``. ``divisor`` is what the gradient w.r.t.
    the products is divided by, :meth:`LogitMap.divisor`; the slope of a cap is left to the kernels.
    """
    maximum, log_sum, _, mean = statistics
    _, grad_log_sum, grad_target, grad_mean = grad_statistics
    # Where every logit is minus infinity, so is each x: no probability in this slice of the vocabulary.
    nothing = log_sum == -torch.inf
    maximum, log_sum = torch.where(nothing, 0.0, maximum), torch.where(nothing, 0.0, log_sum)
    # A target in another slice of the vocabulary has no column here, and its gradient may be anything.
    at_target = torch.where(own, grad_target, 0.0) / divisor
    slope = grad_mean / divisor
    scale = grad_log_sum / divisor + slope * (1 + log_sum - mean)
    return scaled(torch.stack([maximum, log_sum, scale, slope, at_target]), 2, dtype)


def scaled(coefficients: Tensor, first: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scale the coefficients from ``first`` on so that gradients in fp16 neither vanish nor overflow.

    Returns:
        The coefficients, and what to multiply gradients with afterwards; ``None``: nothing.

    """
    if dtype != torch.float16 or not coefficients.shape[1]:
        return coefficients, None
    largest = coefficients[first:].nan_to_num(0, 0, 0).abs().amax()
    exponent = torch.where(largest > 0, (HALF_MAGNITUDE / largest).log2().floor(), 0.0).clamp(-100, 100)
    return torch.cat([coefficients[:first], coefficients[first:] * exponent.exp2()]), (-exponent).exp2()


def gradient_by_statistics(statistics: Tensor, grad_logp: Tensor, grad_entropy: Tensor) -> Tensor:
    """Gradient w.r.t. ``linear_logprob``'s statistics: ``logp = target - log_sum``, ``entropy = log_sum - mean``."""
    defined = is_distribution(statistics)
    grad_logp, grad_entropy = grad_logp * defined, grad_entropy * defined
    return torch.stack([torch.zeros_like(grad_logp), grad_entropy - grad_logp, grad_logp, -grad_entropy])

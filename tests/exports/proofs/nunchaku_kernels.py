"""Nunchaku's kernels, emulated from their index formulas, without the rounding of activations.

Word for word the published layout, one index for each value; loraq's own packing is written as
permutations of axes instead, so that the two can disagree.
"""

import torch
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def axes(n: int, k: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n)[:, None].expand(n, k), torch.arange(k)[None].expand(n, k)


def codes(qweight: Tensor, n: int, k: int) -> Tensor:
    i, j = axes(n, k)
    a, c = i % 128, j % 64
    word = (((((i // 128) * (k // 64) + j // 64) * 8 + a // 16) * 8 + a % 8) * 4 + c % 32 // 8) * 4
    word = word + a % 16 // 8 * 2 + c // 32
    words = qweight.contiguous().flatten().view(torch.int32).long()
    return words[word] >> 4 * (c % 8) & 15


def of_vector(n: int, groups: int) -> Tensor:
    i, g = axes(n, groups)
    a = i % 128
    tile = (i // 128 * groups + g) * 128
    return tile + a // 16 * 16 + a % 8 // 2 * 4 + a % 16 // 8 * 2 + a % 2


def of_micro(n: int, groups: int) -> Tensor:
    i, g = axes(n, groups)
    a, tile = i % 128, (i // 128 * (groups // 4) + g // 4) * 128
    return (tile + a % 8 * 16 + a % 32 // 8 * 4 + a // 32) * 4 + g % 4


def of_down(r: int, k: int) -> Tensor:
    i, j = axes(r, k)
    tile = (j // 16 * (r // 16) + i // 16) * 256
    return tile + i % 8 * 32 + j % 8 // 2 * 8 + i % 16 // 8 * 4 + j % 16 // 8 * 2 + j % 2


def of_up(n: int, r: int) -> Tensor:
    i, j = axes(n, r)
    tile = (i // 16 * (r // 16) + j // 16) * 256
    return tile + i % 8 * 32 + j % 8 // 2 * 8 + i % 16 // 8 * 4 + j % 16 // 8 * 2 + j % 2


class Kernels:
    """The operators that diffusers calls."""

    def quantize_w4a4_act_fuse_lora(self, x, qx, ascales, down, lora_act, smooth, glu, fp4):
        (rows, k), rank = x.shape, down.shape[1]
        lora_act[:rows] = x.float() @ down.flatten()[of_down(rank, k)].float().mT
        self.x, self.fp4 = x.float() / smooth.flatten()[of_vector(k, 1)[:, 0]].float(), fp4

    def gemm_w4a4(self, act, weight, out, _a, _s, wscales, _b, _c, lora_act, up, *rest):
        n, k, rank = weight.shape[0], 2 * weight.shape[1], up.shape[1]
        bias, alpha, channels = rest[5], rest[13], rest[14]
        code = codes(weight, n, k)
        if self.fp4:
            raw = wscales.contiguous().view(torch.uint8).flatten()[of_micro(n, k // 16)]
            scale = raw.view(torch.float8_e4m3fn).float() * alpha.float()
            scale = scale * channels[of_vector(n, 1)].float()
            matrix = E2M1[code] * scale.repeat_interleave(16, 1)
        else:
            scale = wscales.flatten()[of_vector(n, k // 64)].float()
            matrix = torch.where(code >= 8, code - 16, code) * scale.repeat_interleave(64, 1)
        y = self.x @ matrix.mT + lora_act[: out.shape[0]] @ up.flatten()[of_up(n, rank)].float().mT
        out.copy_(y if bias is None else y + bias[of_vector(n, 1)[:, 0]].float())

    def awq_gemm_w4a16_g64_int32(self, x, qweight, wscales, wzeros):
        n, k = 4 * qweight.shape[0], 2 * qweight.shape[1]
        i, j = axes(n, k)
        w = j // 32 * 8 + j % 8
        word = ((i // 4 * (k // 64) + w // 16) * 4 + i % 4) * 16 + w % 16
        words = qweight.contiguous().flatten().view(torch.int16).int()
        code = words[word] >> 4 * (j % 32 // 8) & 15
        scale, zero = (t.float().mT.repeat_interleave(64, 1) for t in (wscales, wzeros))
        return (x.float() @ (code * scale + zero).mT).to(x.dtype)

    def gemv_awq(self, x, qweight, wscales, wzeros, rows, n, k, group):
        return self.awq_gemm_w4a16_g64_int32(x, qweight, wscales, wzeros)

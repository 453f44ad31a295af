"""V-JEPA's update in PyTorch, from its public layers, for `step.py`.

It is written with care: fused attention and optimiser, rotations computed once a step,
no gradient of the target, no statistics. Sizes and token counts are ours.
"""

import math
import types

import torch
import torch.nn.functional as F
from torch import nn

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _rotation(idx, grid, head_dim, dtype):
    """Return cos and sin [B, 1, N, head_dim] of token indices in a (T, H, W) grid."""
    _, height, width = grid
    positions = idx // (height * width), idx // width % height, idx % width
    axis = 2 * (head_dim // 3 // 2)
    power = torch.arange(axis // 2, device=idx.device) / (axis / 2)
    frequency = (10000.0**-power).repeat_interleave(2)
    rest = torch.zeros(*idx.shape, head_dim - 3 * axis, device=idx.device)
    angle = torch.cat([*(p[..., None] * frequency for p in positions), rest], -1)
    return angle.cos()[:, None].to(dtype), angle.sin()[:, None].to(dtype)


def _rotate(x, rotation):
    cos, sin = rotation
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-odd, even), -1).flatten(-2) * sin


class _Block(nn.Module):
    def __init__(self, width, num_heads, mlp_dim):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, width)
        )

    def forward(self, x, rotation):
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = _rotate(q, rotation), _rotate(k, rotation)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(y)
        return x + self.mlp(self.norm2(x))


class _Blocks(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.head_dim = size.width // size.num_heads
        self.blocks = nn.ModuleList(
            _Block(size.width, size.num_heads, size.mlp_dim) for _ in range(size.depth)
        )
        self.norm = nn.LayerNorm(size.width, eps=1e-6)

    def forward(self, x, idx, grid):
        rotation = _rotation(idx, grid, self.head_dim, x.dtype)
        for block in self.blocks:
            x = block(x, rotation)
        return self.norm(x)


def _take(x, idx):
    return x.gather(1, idx[..., None].expand(-1, -1, x.shape[-1]))


class _Encoder(nn.Module):
    def __init__(self, size):
        super().__init__()
        tubelet = (size.tubelet_size, size.patch_size, size.patch_size)
        self.embed = nn.Conv3d(3, size.width, tubelet, stride=tubelet)
        self.blocks = _Blocks(size)

    def forward(self, video, idx, grid):
        return self.blocks(_take(self.embed(video).flatten(2).mT, idx), idx, grid)


class _Predictor(nn.Module):
    def __init__(self, size, out_dim, num_masks):
        super().__init__()
        self.embed = nn.Linear(out_dim, size.width)
        self.tokens = nn.Parameter(torch.zeros(num_masks, size.width))
        self.blocks = _Blocks(size)
        self.proj = nn.Linear(size.width, out_dim)

    def forward(self, context, ctx_idx, tgt_idx, grid, mask):
        x = self.embed(context)
        hidden = self.tokens[mask].to(x.dtype).expand(*tgt_idx.shape, -1)
        x = torch.cat([x, hidden], 1)
        x = self.blocks(x, torch.cat([ctx_idx, tgt_idx], 1), grid)
        return self.proj(x[:, ctx_idx.shape[1] :])


class Peer:
    """The update and its state; a call runs one step on random clips.

    Args:
      sizes: `encoder` and `predictor`, with the integer fields of our modules; `clip`,
        (T, H, W) in pixels; `grid`, (T, H, W) in tokens; `masks`, the (context, target)
        token counts of each mask type; `batch_size`.
      dtype: `float32`, or `bfloat16` by autocast.
      device: `cpu` or `cuda`; the latter compiles by `torch.compile`.
    """

    def __init__(self, sizes: types.SimpleNamespace, dtype: str, device: str):
        self.grid, self.masks, self.batch_size = (
            sizes.grid,
            sizes.masks,
            sizes.batch_size,
        )
        self.device, self.dtype = device, getattr(torch, dtype)
        encoder = sizes.encoder
        self.encoder = _Encoder(encoder).to(device)
        self.target = _Encoder(encoder).to(device).requires_grad_(False)
        self.target.load_state_dict(self.encoder.state_dict())
        self.predictor = _Predictor(sizes.predictor, encoder.width, len(sizes.masks))
        self.predictor.to(device)
        parameters = [*self.encoder.parameters(), *self.predictor.parameters()]
        self.optimiser = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        self.video = torch.randint(
            0, 256, (sizes.batch_size, *sizes.clip, 3), dtype=torch.uint8, device=device
        )
        self.mean = torch.tensor(_MEAN, device=device)
        self.std = torch.tensor(_STD, device=device)
        self.loss = torch.compile(self._loss) if device == "cuda" else self._loss

    def _loss(self, video, drawn):
        video = (video / 255.0 - self.mean) / self.std
        video = video.movedim(-1, 1)
        num_tokens = math.prod(self.grid)
        everything = torch.arange(num_tokens, device=self.device)
        everything = everything.expand(self.batch_size, -1)
        with torch.no_grad():
            features = self.target(video, everything, self.grid).float()
            features = F.layer_norm(features, features.shape[-1:])
        total = 0.0
        for mask, (ctx_idx, tgt_idx) in enumerate(drawn):
            context = self.encoder(video, ctx_idx, self.grid)
            prediction = self.predictor(context, ctx_idx, tgt_idx, self.grid, mask)
            error = prediction.float() - _take(features, tgt_idx)
            total = total + error.abs().mean()
        return total / len(drawn)

    def _draw(self):
        shape = self.batch_size, math.prod(self.grid)
        for context, target in self.masks:
            order = torch.rand(shape, device=self.device).argsort(-1)
            yield order[:, :context], order[:, context : context + target]

    def __call__(self) -> float:
        """Run one update and wait for its loss."""
        is_half = self.dtype != torch.float32
        with torch.autocast(self.device, self.dtype, enabled=is_half):
            loss = self.loss(self.video, list(self._draw()))
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            ours, theirs = self.target.parameters(), self.encoder.parameters()
            torch._foreach_lerp_(list(ours), list(theirs), 1e-3)
        return loss.item()

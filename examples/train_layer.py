"""Trains a language model on the bytes of a text: plain PyTorch, with GQEAttention in place of attention.

python examples/train_layer.py                                   # on the source code of Python's standard library
python examples/train_layer.py --text my-text.txt --steps 2000
"""

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from query_experts import GQEAttention, Routing

GROUPS, EXPERTS, TOP_K = 4, 2, 1  # in each of 4 groups, a token selects 1 of 2 query heads
WIDTH, LAYERS, LENGTH, BATCH = 128, 4, 128, 8
BALANCE_COEF = 0.01  # the paper's; without the balance loss, experts may die


class Block(nn.Module):
    def __init__(self, layer: int):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = GQEAttention(
            WIDTH, GROUPS * EXPERTS, GROUPS, TOP_K, rope_theta=10_000.0, layer_idx=layer
        )  # fmt: skip
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        y, routing = self.attention(self.attention_norm(x), output_routing=True)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), routing


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList(Block(layer) for layer in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Routing]]:
        """tokens [B, T] -> logits [B, T, 256], and what the router of each layer decided."""
        x, routings = self.embed(tokens), []
        for block in self.blocks:
            x, routing = block(x)
            routings.append(routing)
        return self.head(self.norm(x)), routings


def language_model_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def random_rows(data: Tensor, rows: int) -> Tensor:
    """Pieces of the data, [rows, LENGTH]."""
    return torch.stack([data[start : start + LENGTH] for start in torch.randint(len(data) - LENGTH, (rows,))])


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--text", type=Path, help="a file to train on")
parser.add_argument("--steps", type=int, default=300)
args = parser.parse_args()
if args.steps < 1:
    parser.error(f"--steps is {args.steps}; it must be 1 or more")
files = [args.text] if args.text else sorted(Path(os.__file__).parent.glob("*.py"))
try:
    data = torch.tensor(list(b"".join(file.read_bytes() for file in files)))
except OSError as error:
    parser.error(f"--text is {args.text}, which can't be read: {error}")
training, held_out = data.tensor_split([len(data) * 19 // 20])
if len(held_out) <= LENGTH:
    parser.error(f"--text holds {len(data)} bytes; it must hold more than {20 * LENGTH}")

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = Decoder().to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for step in range(1, args.steps + 1):
    tokens = random_rows(training, BATCH).to(device)
    logits, routings = model(tokens)
    loss = language_model_loss(logits, tokens)
    balance = sum(routing.balance_loss for routing in routings)
    (loss + BALANCE_COEF * balance).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 0 or step == args.steps:
        print(f"step {step}: loss {loss:.3f}, balance loss {balance / LAYERS:.3f} a layer (1 is even)")

tokens = random_rows(held_out, 4 * BATCH).to(device)
with torch.no_grad():
    logits, routings = model.eval()(tokens)
print(f"held-out loss: {language_model_loss(logits, tokens):.3f} nats a byte")
for layer, routing in enumerate(routings):
    load = F.one_hot(routing.indices, EXPERTS).sum(-2).float().mean((0, 1))  # share of tokens, [G, M]
    shares = [" ".join(f"{share:.0%}" for share in group) for group in load.tolist()]
    print(f"layer {layer}: load of the experts of each group: {' | '.join(shares)}")

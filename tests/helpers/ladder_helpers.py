"""Makes results of a ladder whose law is known."""

import dataclasses

import numpy as np

from query_experts.study.ladder.results import LadderResult, RoutingPoint
from query_experts.study.results import Piece, RoutingLoad

HERE = {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "query_experts": "0.1.0", "device": "cpu",
        "hardware": "a CPU, 1 thread", "dtype": "float32", "date": "2026-11-23"}  # fmt: skip
EMBEDDINGS = 131_072
SIZES = {"d64": 340_000, "d96": 900_000, "d128": 1_900_000, "d192": 5_200_000, "d256": 12_000_000}  # without embeddings
SEEDS = {"d64": 10, "d96": 10, "d128": 5, "d192": 3}
BUDGETS = (0.25, 0.5, 1.0)
E, ALPHA, BETA, A, B = 1.7, 0.34, 0.28, 60.0, 110.0
HEADS = {"dense": 8, "static": 5, "half": 4}


def law(size, tokens, a=A, b=B, alpha=ALPHA):
    return E + a * size**-alpha + b * tokens**-BETA


def run(arm="gqe", rung="d64", seed=0, budget=1.0, loss=4.0, **fields):
    """One result; loss None: a run that diverged."""
    size = SIZES.get(rung, 400_000)
    tokens = round(20 * size * budget)
    routed = arm.startswith("gqe") and loss is not None
    values = {
        "ladder": "cpu", "rung": rung, "arm": arm, "seed": seed, "budget": budget, "parameters": size + EMBEDDINGS,
        "embedding_parameters": EMBEDDINGS, "active_parameters": size + EMBEDDINGS, "active_heads": HEADS.get(arm, 5),
        "train_tokens": tokens, "flops": 6.5 * size * tokens, "active_flops": 6.2 * size * tokens,
        "diverged_at_tokens": tokens // 2 if loss is None else None, "validation_loss": loss,
        "bits_per_byte": None if loss is None else loss / 2, "parts": [],
        "routing": RoutingLoad([[[0.6, 0.4], [0.995, 0.005]]], [[0.9, 0.2]], 1, 0.01) if routed else None,
        "routing_curve": [
            RoutingPoint(tokens=tokens * i // 8, entropy=1 - 0.03 * i, entropy_lowest=0.9 - 0.08 * i,
                         highest_load=0.5 + 0.04 * i, dead=0)
            for i in range(1, 9)
        ] if routed else [],
        "curve": [(tokens * i // 8, 4 + 1 / i) for i in range(1, 9)], "settings": {"learning_rate": 2e-3},
        "pieces": [Piece(first_step=0, **HERE)], "instructions": "AVX512_BF16", "train_seconds": 60.0,
        "tokens_per_s": tokens / 60, "data_hash": "sha256:abc", "tag": "ladder-1",
    }  # fmt: skip
    return LadderResult(**values | fields)


def ladder(gaps, noise=0.02, rungs=SEEDS, budgets=BUDGETS, loss=law, random=0, scatter=0.0):
    """Results of every arm, rung, seed and budget.

    Args:
        gaps: By arm, what is added to the law at log10 of the compute: a function or a number.
        noise: Standard deviation of the seeds.
        scatter: Standard deviation of what a rung and arm share over all seeds and budgets.
        loss: The law of parameters without embeddings and tokens.
    """
    generator, of_rungs = np.random.default_rng(random), np.random.default_rng([random, 1])
    shared = {(rung, arm): scatter * of_rungs.standard_normal() for rung in rungs for arm in gaps}
    results = []
    for rung, seeds in rungs.items():
        for seed in range(seeds):
            for arm, gap in gaps.items():
                own = noise * generator.standard_normal()  # of a run, shared by its budgets
                for budget in budgets:
                    blank = run(arm, rung, seed, budget)
                    added = gap(np.log10(blank.flops)) if callable(gap) else gap
                    value = loss(blank.parameters - EMBEDDINGS, blank.train_tokens) + added + own + shared[rung, arm]
                    value += 0.3 * noise * generator.standard_normal()
                    results.append(dataclasses.replace(blank, validation_loss=float(value), bits_per_byte=value / 2))
    return results

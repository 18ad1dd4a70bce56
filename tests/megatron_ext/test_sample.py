"""Sampling: the prompt comes first, temperature 0 is one text, and no layout changes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext.checkpoint import folder
from megatron_ext.data.tokenizer import load_tokenizer
from parallel.plan.records import Piece
from parallel.plan.rings import RowLayout
from tests.megatron_ext.tiny_run import make_corpus, opened, tiny_tree
from tests.rank_pool import Ranks

PROMPT = "def bisect(a, x"
NUM_TOKENS = 24


def save_a_talker(tree: dict[str, Any]) -> None:
    """A checkpoint whose texts are nonsense, but hang on every token before them.

    A model of a minute's training would say the likeliest byte over and over.
    """
    from megatron_ext.trainer import save

    with opened(tree) as run:
        with torch.no_grad():
            for parameter in run.chunks[0].parameters():
                if parameter.dim() > 1:
                    parameter.mul_(5)
            # Bytes above 127 alone are no text, and the end of a document would cut it short.
            run.chunks[0].module.output_layer.weight[128:] = 0
        save(run)


@pytest.fixture(scope="module")
def tree(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The configuration of a run with a checkpoint."""
    home = tmp_path_factory.mktemp("sample")
    tree = tiny_tree(make_corpus(home), home / "run", model={"num_layers": 4})
    ranks.run(1, save_a_talker, tree, megatron=True)
    return tree


def checkpoint_of(tree: dict[str, Any]) -> Path:
    ((_, path),) = folder.complete_checkpoints(Path(tree["log"]["run_dir"]))
    return path


def samples(tree: dict[str, Any], requests: list[dict[str, Any]]) -> list[str]:
    """Texts from the checkpoint of a run, on the layout of `tree`."""
    from megatron_ext.sampler import open_sampler
    from tests.megatron_ext.tiny_run import tiny_config

    config = tiny_config(tree, torch.distributed.get_world_size())
    checkpoint = checkpoint_of(tree)
    options = {"num_tokens": NUM_TOKENS, "temperature": 0.0, "top_k": 0, "seed": 0}
    tokenizer = load_tokenizer(checkpoint)
    with open_sampler(config, checkpoint, tokenizer, torch.device("cpu")) as sampler:
        return [sampler.sample(**{"prompt": PROMPT} | options | request) for request in requests]


def test_likeliest_and_random_texts(ranks: Ranks, tree: dict[str, Any]) -> None:
    hot = {"temperature": 1.0}
    requests: dict[str, dict[str, Any]] = {
        "likeliest": {},
        "likeliest, other seed": {"seed": 1},
        "one candidate": hot | {"top_k": 1},
        "random": hot,
        "random again": hot,
        "random, other seed": hot | {"seed": 1},
        "all candidates named": hot | {"top_k": 257},
        "nothing": {"num_tokens": 0},
        "no prompt": {"prompt": ""},
        # Longer than what the model has seen at once: the window moves.
        "long prompt": {"prompt": "x = 1\n" * 40},
    }
    (texts,) = ranks.run(1, samples, tree, list(requests.values()), megatron=True)
    found = dict(zip(requests, texts, strict=True))
    assert found["likeliest"].startswith(PROMPT)
    assert len(found["likeliest"]) == len(PROMPT) + NUM_TOKENS
    assert len(set(found["likeliest"][len(PROMPT) :])) > 5, "a test needs a text that varies"
    assert found["likeliest, other seed"] == found["likeliest"]
    assert found["one candidate"] == found["likeliest"]
    assert found["random"].startswith(PROMPT)
    assert found["random again"] == found["random"]
    assert found["random, other seed"] != found["random"]
    assert found["all candidates named"] == found["random"]
    assert found["nothing"] == PROMPT
    assert len(found["no prompt"]) <= NUM_TOKENS
    assert found["long prompt"].startswith("x = 1\n" * 40)
    assert len(found["long prompt"]) > 240


@torch.no_grad()
def likeliest_by_hand(tree: dict[str, Any]) -> str:
    """Token after token: the whole text through the model, the largest of the last logits."""
    from megatron_ext.batch import pack
    from megatron_ext.model import output_weight
    from megatron_ext.sampler import open_sampler
    from tests.megatron_ext.tiny_run import tiny_config

    config, checkpoint = tiny_config(tree, 1), checkpoint_of(tree)
    tokenizer = load_tokenizer(checkpoint)
    ids = [tokenizer.eod, *tokenizer.encode(PROMPT)]
    with open_sampler(config, checkpoint, tokenizer, torch.device("cpu")) as sampler:
        for _ in range(NUM_TOKENS):
            tokens = np.array(ids)
            batch = pack(
                [(tokens, tokens)],
                RowLayout(whole=(Piece(0, 0, len(ids)),), rings=(), rank=0),
                num_tokens=len(ids),
                head_dim=config.model.head_dim,
                rotary_base=config.model.rotary_base,
            ).to(torch.device("cpu"))
            hidden = sampler.chunks[0](
                input_ids=batch.tokens,
                position_ids=batch.positions,
                attention_mask=None,
                packed_seq_params=batch.documents,
            )
            logits = hidden[0, -1] @ output_weight(sampler.chunks[0]).t()
            # Rows that only fill up the vocabulary are no tokens.
            ids.append(int(logits[: tokenizer.vocab_size].argmax()))
            if ids[-1] == tokenizer.eod:
                break
    return tokenizer.decode(ids[1:])


def test_likeliest_text_is_the_models_own(ranks: Ranks, tree: dict[str, Any]) -> None:
    assert ranks.run(1, samples, tree, [{}], megatron=True) == [
        ranks.run(1, likeliest_by_hand, tree, megatron=True)
    ]


@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor_model_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        {},
    ],
    ids=["TP2", "TP2+SP", "PP2", "VPP2", "DP2"],
)
def test_every_rank_of_every_layout_says_the_same(
    ranks: Ranks, tree: dict[str, Any], parallel: dict[str, Any]
) -> None:
    requests = [{}, {"temperature": 0.8, "top_k": 20, "seed": 3}]
    (expected,) = ranks.run(1, samples, tree, requests, megatron=True)
    found = ranks.run(2, samples, tree | {"parallel": parallel}, requests, megatron=True)
    assert found == [expected, expected]


def test_generate_prints_prompt_and_continuation(ranks: Ranks, tree: dict[str, Any]) -> None:
    words = ["generate", tree["log"]["run_dir"], "--prompt", PROMPT, "--temperature", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_ext", *words, "--tokens", str(NUM_TOKENS)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (expected,) = ranks.run(1, samples, tree, [{}], megatron=True)
    assert done.stdout == expected[0] + "\n"


def check_choice() -> None:
    from megatron_ext.sample import _choose

    logits = torch.tensor([0.0, 3.0, 2.0, -1.0, 2.9])
    generator = torch.Generator().manual_seed(0)
    assert _choose(logits, 0.0, 0, generator) == 1
    few = [_choose(logits, 1.0, 2, generator) for _ in range(200)]
    assert set(few) == {1, 4}
    counts = torch.bincount(
        torch.tensor([_choose(logits, 1.0, 0, generator) for _ in range(4000)]), minlength=5
    )
    expected = 4000 * torch.softmax(logits, dim=0)
    # Four standard deviations of a binomial count.
    assert bool(((counts - expected).abs() <= 4 * expected.sqrt() + 1).all()), counts
    cold = [_choose(logits, 0.01, 0, generator) for _ in range(50)]
    assert set(cold) <= {1, 4}
    assert cold.count(1) > 45
    assert _choose(logits, 1e-40, 0, generator) == 1


def test_choice_follows_temperature_and_top_k(ranks: Ranks) -> None:
    ranks.run(1, check_choice, megatron=True)

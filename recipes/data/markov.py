"""The toy of the LoRA-MCL paper: sequences of a few Markov chains, mixed, and what can be achieved on them.

    python -m recipes.data.markov                                    # builds the folder, prints its path on the last line
    python -m recipes.data.markov --chains transition2 --priors .7 .3 --seed 1
    python -m recipes.data.markov --model                            # the paper's small random model instead

Each sequence is drawn from one chain, whose number is the column `chain`: training must never see it. Each chain has
two states, is written (p, q) for the transition matrix [[1-p, p], [q, 1-q]], and starts in either state alike.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPTNeoConfig, GPTNeoForCausalLM, PreTrainedTokenizerFast

from recipes.data.cache import build_once, cache_root


Chain = tuple[float, float]  # p, from state 0 to 1; q, from state 1 to 0

TRANSITION1: tuple[Chain, ...] = ((0.2, 0.9), (0.8, 0.25))
TRANSITION2: tuple[Chain, ...] = ((0.7, 0.8), (0.8, 0.25))
CHAINS = {
    "transition1": TRANSITION1,
    "transition2": TRANSITION2,
    "three": ((0.2, 0.9), (0.8, 0.25), (0.1, 0.1)),  # ours, not the paper's
}
LENGTH = 32
FOLDER = "markov"
BUILDER_VERSION = "1"
PADDING = "<pad>"  # never in a sequence; a tokenizer without it is refused by trainers
# With GPT-Neo's own .02 the frozen embeddings are so short that no adapter reaches the chains' probabilities: after 400
# steps on one chain (entropy .465) LoRA of rank 64 is at .616, here at .468.
INITIALIZER_RANGE = 0.2


@dataclass(frozen=True)
class Theory:
    """What can be achieved on a mixture of chains, in nats per predicted token; the first token is not predicted.

    Args:
        mixture: Entropy of the mixture, the least loss of any single model.
        lowest: `mixture` less log K over the number of predicted tokens: no K hypotheses have a lower best-of-K loss.
        chains: Entropy given the chain, averaged over the chains: what hypotheses that equal the chains reach when
            each takes the sequences of its own chain. The least best-of-K loss lies between `lowest` and this.
        rate: Average of the chains' entropy rates, once they are stationary: the paper's upper end. From a uniform start
            it is a little off, so `chains` is the sharp one.
        winners: Best-of-K loss of hypotheses that equal the chains.
        purity: Share of the sequences that those assign to the chain they came from.
    """

    mixture: float
    lowest: float
    chains: float
    rate: float
    winners: float
    purity: float


def _checked(chains: Sequence[Chain], priors: Sequence[float] | None, length: int) -> NDArray[np.float64]:
    if not chains or not all(len(chain) == 2 and 0 <= min(chain) <= max(chain) <= 1 for chain in chains):
        raise ValueError(f"`chains` has to be a list of pairs (p, q) of probabilities, got {chains!r}.")
    weights = np.ones(len(chains)) if priors is None else np.asarray(priors, dtype=np.float64)
    if weights.shape != (len(chains),) or not np.isfinite(weights).all() or not (weights > 0).all():
        raise ValueError(f"`priors` has to be one positive number for each of {len(chains)} chains, got {priors!r}.")
    if length < 2:
        raise ValueError(f"`length` has to be 2 or more, one state to start from and one to predict, got {length}.")
    return weights / weights.sum()


def sample(
    chains: Sequence[Chain] = TRANSITION1,
    priors: Sequence[float] | None = None,
    num_sequences: int = 1024,
    length: int = LENGTH,
    seed: int = 0,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw sequences from a mixture of chains.

    Args:
        chains: The chains.
        priors: How probable each of them is, in any unit. `None`: all the same.
        num_sequences: How many sequences to draw.
        length: Tokens of each.
        seed: Another seed, other sequences.

    Returns:
        States (num_sequences, length), 0 or 1, and the number of the chain of each sequence (num_sequences,).

    Raises:
        ValueError: If `chains`, `priors` or `length` make no sense.
    """
    weights = _checked(chains, priors, length)
    random = np.random.default_rng(seed)
    chain = np.searchsorted(np.cumsum(weights)[:-1], random.random(num_sequences), side="right")
    leave = np.asarray(chains, dtype=np.float64)[chain]  # (num_sequences, 2): the probability of leaving each state
    states = np.empty((num_sequences, length), dtype=np.int64)
    states[:, 0] = random.random(num_sequences) < 0.5
    for t in range(1, length):
        leaves = random.random(num_sequences) < leave[np.arange(num_sequences), states[:, t - 1]]
        states[:, t] = np.where(leaves, 1 - states[:, t - 1], states[:, t - 1])
    return states, chain.astype(np.int64)


def theory(
    chains: Sequence[Chain] = TRANSITION1, priors: Sequence[float] | None = None, length: int = LENGTH
) -> Theory:
    """Compute what can be achieved on a mixture of chains, exactly: sequences with equal counts are equally probable.

    Args:
        chains: The chains, K of them.
        priors: As `sample` takes them.
        length: Tokens of each sequence.

    Returns:
        The figures.

    Raises:
        ValueError: If `chains`, `priors` or `length` make no sense.
    """
    weights = _checked(chains, priors, length)
    classes = transition_counts(length)
    counts = np.array([key[1:] for key in classes], dtype=np.float64)  # (C, 4)
    size = np.array(list(classes.values()), dtype=np.float64) / 2  # the start is uniform: each is half as probable
    steps = np.array([[1 - p, p, q, 1 - q] for p, q in chains])  # (K, 4)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(counts[:, None] > 0, counts[:, None] * np.log(steps), 0).sum(-1)  # (C, K), of the steps
    shares = size[:, None] * np.exp(logs) * weights  # joint probability of a class and a chain
    total = shares.sum(1)
    possible = total > 0
    shares, total, logs, size = shares[possible], total[possible], logs[possible], size[possible]
    predicted = length - 1
    mixture = -float(total @ np.log(total / size)) / predicted
    best = logs.max(1)
    wins = logs >= best[:, None] - 1e-9
    return Theory(
        mixture=mixture,
        lowest=mixture - math.log(len(chains)) / predicted,
        chains=-float((shares * np.where(shares > 0, logs, 0)).sum()) / predicted,
        rate=float(weights @ [_entropy_rate(p, q) for p, q in chains]),
        winners=-float(total @ best) / predicted,
        purity=float((shares * wins / wins.sum(1, keepdims=True)).sum()),
    )


def averaged_chain(
    chains: Sequence[Chain] = TRANSITION1, priors: Sequence[float] | None = None, length: int = LENGTH
) -> Chain:
    """Compute the one chain that a mixture looks like, if what came before the last state is forgotten.

    Its transitions are those of the chains, each weighted by how often it is in the state that is left.

    Args:
        chains: The chains.
        priors: As `sample` takes them.
        length: Tokens of each sequence.

    Returns:
        The chain (p, q).

    Raises:
        ValueError: If `chains`, `priors` or `length` make no sense.
    """
    weights = _checked(chains, priors, length)
    leave = np.asarray(chains, dtype=np.float64)  # (K, 2)
    occupied = np.full_like(leave, 0.5)  # the probability of each state, now
    visits = np.zeros_like(leave)
    for _ in range(length - 1):
        visits += occupied
        leaving = occupied * leave
        occupied = occupied - leaving + leaving[:, ::-1]
    visits *= weights[:, None]
    p, q = (visits * leave).sum(0) / visits.sum(0)
    return float(p), float(q)


def log_likelihoods(states: NDArray[np.int64], chains: Sequence[Chain] = TRANSITION1) -> NDArray[np.float64]:
    """Compute what each chain makes of each sequence, the first token given.

    Args:
        states: (N, T), 0 or 1.
        chains: The chains, K of them.

    Returns:
        (N, K), nats for each sequence; -inf for what a chain cannot produce.

    Raises:
        ValueError: If `chains` or T make no sense.
    """
    _checked(chains, None, states.shape[1])
    steps = np.array([[[1 - p, p], [q, 1 - q]] for p, q in chains])  # (K, 2, 2)
    with np.errstate(divide="ignore"):
        logs = np.log(steps)[:, states[:, :-1], states[:, 1:]]  # (K, N, T - 1)
    return logs.sum(-1).T


def _entropy_rate(p: float, q: float) -> float:
    of_0, of_1 = (-sum(x * math.log(x) for x in (leave, 1 - leave) if x) for leave in (p, q))
    # Stationary: q / (p + q) of the time in state 0. A chain that leaves neither state has no entropy in either.
    return (q * of_0 + p * of_1) / (p + q) if p + q else 0.0


def transition_counts(length: int) -> Counter[tuple[int, int, int, int, int]]:
    """Count the sequences of two states by their transitions.

    Args:
        length: Tokens of a sequence.

    Returns:
        How many sequences end in a state and have so many steps 00, 01, 10 and 11, by (state, four counts).
    """
    classes: Counter[tuple[int, int, int, int, int]] = Counter({(0, 0, 0, 0, 0): 1, (1, 0, 0, 0, 0): 1})
    for _ in range(length - 1):
        longer: Counter[tuple[int, int, int, int, int]] = Counter()
        for (state, *steps), number in classes.items():
            for new in (0, 1):
                at = 2 * state + new
                a, b, c, d = (count + (i == at) for i, count in enumerate(steps))
                longer[new, a, b, c, d] += number
        classes = longer
    return classes


def prepare_dataset(
    chains: Sequence[Chain] = TRANSITION1,
    priors: Sequence[float] | None = None,
    num_sequences: int = 64_128,
    num_test: int = 2_048,
    length: int = LENGTH,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> Path:
    """Return a folder with `train.jsonl`, `test.jsonl` and `theory.json`, building it on the first call.

    Each row has `input_ids`, which are the states, and `chain`, the number of the chain they were drawn from.

    Args:
        chains: The chains.
        priors: As `sample` takes them.
        num_sequences: Rows of `train.jsonl`. The default is the paper's 501 steps of 128.
        num_test: Rows of `test.jsonl`.
        length: Tokens of each sequence.
        seed: Of both; training and test rows are drawn one after the other.
        cache_dir: Cache folder; see `recipes.data.cache.cache_root`.

    Returns:
        The folder.

    Raises:
        ValueError: If `chains`, `priors`, `length` or the numbers of rows make no sense.
    """
    weights = _checked(chains, priors, length)
    for name, count in (("num_sequences", num_sequences), ("num_test", num_test)):
        if count < 1:
            raise ValueError(f"`{name}` has to be 1 or more, got {count}.")

    def build(folder: Path) -> None:
        states, chain = sample(chains, priors, num_sequences + num_test, length, seed)
        rows = [
            json.dumps({"input_ids": row, "chain": k}) for row, k in zip(states.tolist(), chain.tolist(), strict=True)
        ]
        for split, part in (("train", rows[:num_sequences]), ("test", rows[num_sequences:])):
            (folder / f"{split}.jsonl").write_text("".join(row + "\n" for row in part), newline="\n")
        (folder / "theory.json").write_text(json.dumps(vars(theory(chains, priors, length)), indent=2) + "\n")

    parts = [f"{share:.3g}x{p:g}+{q:g}" for share, (p, q) in zip(weights, chains, strict=True)]
    name = "-".join([*parts, f"{num_sequences}+{num_test}", f"length{length}", f"seed{seed}"])
    version = f"{BUILDER_VERSION} {json.dumps([list(map(list, chains)), weights.tolist()])}"  # the name rounds
    return build_once(cache_root(cache_dir) / FOLDER / name, version, build)


def random_neo(seed: int = 0, cache_dir: str | Path | None = None) -> Path:
    """Return the folder of a small random GPT-Neo and its tokenizer, building it on the first call.

    Two layers, global and local attention, 64 wide, a window of 5. Its words are `0`, `1` and padding.

    Args:
        seed: Of the weights.
        cache_dir: Cache folder; see `recipes.data.cache.cache_root`.

    Returns:
        A folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load.
    """

    def build(folder: Path) -> None:
        words = {"0": 0, "1": 1, PADDING: 2}
        backend = Tokenizer(WordLevel(words, unk_token=PADDING))
        backend.pre_tokenizer = WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PADDING, eos_token=PADDING)
        tokenizer.save_pretrained(folder)
        config = GPTNeoConfig(
            vocab_size=len(words),
            max_position_embeddings=256,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=5,
            attention_dropout=0.0,
            embed_dropout=0.0,
            resid_dropout=0.0,
            initializer_range=INITIALIZER_RANGE,
            bos_token_id=words[PADDING],
            eos_token_id=words[PADDING],
            pad_token_id=words[PADDING],
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = GPTNeoForCausalLM(config)
        model.save_pretrained(folder)

    return build_once(cache_root(cache_dir) / f"{FOLDER}-neo-seed{seed}", BUILDER_VERSION, build)


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the folder with the data set, or the model.")
    parser.add_argument(
        "--chains", choices=sorted(CHAINS), default="transition1", help="The paper's two mixtures, or three chains."
    )
    parser.add_argument("--priors", nargs="+", type=float, help="How probable each chain is; default: all the same.")
    parser.add_argument("--num_sequences", type=int, default=64_128, help="Rows to train on.")
    parser.add_argument("--num_test", type=int, default=2_048, help="Rows to test on.")
    parser.add_argument("--length", type=int, default=LENGTH, help="Tokens of each sequence.")
    parser.add_argument("--seed", type=int, default=0, help="Of the sequences, or of the model's weights.")
    parser.add_argument("--model", action="store_true", help="The random GPT-Neo instead of the data.")
    arguments = vars(parser.parse_args())
    if arguments.pop("model"):
        print(random_neo(arguments["seed"]))
    else:
        print(prepare_dataset(CHAINS[arguments.pop("chains")], **arguments))


if __name__ == "__main__":
    main()

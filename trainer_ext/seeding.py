"""Where hypotheses begin: clusters of what the base model sees in the sequences.

Which hypothesis takes which kind of sequence is decided early, by differences that are noise then, and is hard to change
later. So for the first part of the competition the sequences go to hypotheses by clusters of their features, as the centres of
k-means are seeded before its own rounds begin; then the scores decide.

The features are hidden states of the middle of the base model, which tell languages and styles apart better than the last
ones, which are about the next token. What the prompt tells of a completion is taken out (by linear regression), so that
clusters are of answers and not of subjects. The clusters are Gaussians with one covariance for all: clusters of k-means have
the same size in every direction and nearly the same number of sequences, so that a frequent mode is cut and rare ones are
joined.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits


# Directions of the prompt that are taken out of the completion, and those in which clusters are looked for; the latter are at
# least twice as many as clusters.
PROMPT_DIRECTIONS = 16
CLUSTER_DIRECTIONS = 12
# But each direction takes so many sequences to be known.
SEQUENCES_OF_A_DIRECTION = 16
# Of 10, 40 found a likelier mixture where modes were unequal. They take less than a second.
ATTEMPTS = 40


@dataclass(frozen=True)
class Clusters:
    """K clusters of sequences. Linear in the features of a sequence, once the prompt is taken out: one covariance for all.

    Attributes:
        prompt_in, prompt_out, offset (`torch.Tensor`): float32 of shapes (width, M), (M, width) and (width,): what the prompt
            tells of the completion.
        directions, bias (`torch.Tensor`): float32 of shapes (width, K) and (K,): to log(share_k N(x; mean_k, covariance)), up
            to what is the same for all k.
        shares (`torch.Tensor`): float32 of shape (K,), summing to 1; falling.
    """

    prompt_in: torch.Tensor
    prompt_out: torch.Tensor
    offset: torch.Tensor
    directions: torch.Tensor
    bias: torch.Tensor
    shares: torch.Tensor

    def closeness(self, features: torch.Tensor) -> torch.Tensor:
        """For B sequences, features of shape (B, 2, width), the log-probability of each cluster: float32 of shape (B, K)."""
        on = {name: tensor.to(features.device) for name, tensor in self.tensors().items()}
        completion, prompt = features[:, 0], features[:, 1]
        said = completion - (prompt @ on["prompt_in"]) @ on["prompt_out"] - on["offset"]
        return torch.log_softmax(F.normalize(said, dim=1) @ on["directions"] + on["bias"], dim=1)

    def arranged(self, order: list[int]) -> Clusters:
        """The same in another order: cluster k is what was `order[k]`."""
        tensors = self.tensors()
        for name in ("directions", "bias", "shares"):
            tensors[name] = tensors[name][..., order]
        return Clusters(**tensors)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All attributes by name, for a file of safetensors."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


# Its loops are tiny: threads that wait for each other took 20 times as long where the cores were busy.
@threadpool_limits.wrap(limits=1)
def find_clusters(features: torch.Tensor, count: int, seed: int) -> Clusters:
    """A mixture of Gaussians with one covariance, the likeliest of 40 attempts, in the main directions of the features.

    Where there are no more sequences than clusters, nothing tells the clusters apart.

    Args:
        features (`torch.Tensor`): Finite, of shape (N, 2, width): see `scoring.pool_sequences`.
        count (`int`): K.
        seed (`int`): Of the attempts.
    """
    size, _, width = features.shape
    if size <= count:
        equal = torch.full((count,), 1 / count)
        nothing = torch.zeros(width, 0)
        return Clusters(nothing, nothing.T, torch.zeros(width), torch.zeros(width, count), torch.zeros(count), equal)
    completion, prompt = features.double().cpu().numpy().transpose(1, 0, 2)

    known = size // SEQUENCES_OF_A_DIRECTION
    # Without prompts, or with one for all, there is nothing to take out.
    varied = min(PROMPT_DIRECTIONS, known, width) if np.ptp(prompt, axis=0).any() else 0
    prompt_in = PCA(varied, random_state=seed).fit(prompt).components_ if varied else np.zeros((0, width))
    # The mean over all sequences is taken out as well.
    causes = np.column_stack([prompt @ prompt_in.T, np.ones(size)])
    *effects, offset = np.linalg.lstsq(causes, completion, rcond=None)[0]
    prompt_out = np.reshape(effects, (varied, width))
    said = completion - causes @ np.vstack([prompt_out, offset])
    said /= np.linalg.norm(said, axis=1, keepdims=True).clip(min=np.finfo(np.float32).tiny)

    wanted = max(CLUSTER_DIRECTIONS, 2 * count)
    main = PCA(min(wanted, max(known, 1), width), random_state=seed).fit(said)
    # The regularisation of the covariance is in absolute numbers.
    scale = max(np.sqrt(main.explained_variance_.mean()), np.finfo(np.float32).tiny)
    mixture = GaussianMixture(count, covariance_type="tied", n_init=ATTEMPTS, random_state=seed)
    mixture.fit(main.transform(said) / scale)

    # log N(x; m, C) = x C^-1 m - m C^-1 m / 2 and what does not depend on m.
    slopes = mixture.precisions_ @ mixture.means_.T
    directions = main.components_.T @ slopes / scale
    bias = np.log(mixture.weights_) - (mixture.means_.T * slopes).sum(axis=0) / 2 - main.mean_ @ directions
    tensors = (prompt_in.T, prompt_out, offset, directions, bias, mixture.weights_)
    found = Clusters(*(torch.from_numpy(np.ascontiguousarray(array)).float() for array in tensors))
    return found.arranged(found.shares.argsort(descending=True, stable=True).tolist())

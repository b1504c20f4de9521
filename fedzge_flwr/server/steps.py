"""How the central model's steps of a run are shared out over its rounds."""

from __future__ import annotations

from itertools import accumulate, pairwise

from fedzge_flwr.config.sections import Settings
from fedzge_flwr.synthesis.memory import most_kept


def central_steps(settings: Settings, num_rounds: int) -> tuple[int, ...]:
    """Return the steps of each round, in proportion to the answers that the round draws from.

    So an answer is drawn alike often in a late round and in an early one, when few are there to be
    fitted too closely. Without a memory a round draws from its own answers, and all have as many.

    Parameters
    ----------
    settings : Settings
        The run's.
    num_rounds : int
        Its rounds, at least 1.

    Returns
    -------
    tuple of int
        At least 1 each; ``central-distill-steps`` on average, but for rounding.
    """
    distillation, images = settings.distillation, settings.images.synthetic_batch_size
    kept = most_kept(distillation.memory_size, settings.data.spec.image_shape)
    rounds = range(1, num_rounds + 1)
    answers = [min(round_ * images, max(kept, images)) for round_ in rounds]
    total = distillation.central_distill_steps * num_rounds
    # Of sums, so that what rounding takes from one round the next one has.
    sums = list(accumulate(answers))
    ends = [0, *(round(total * drawn / sums[-1]) for drawn in sums)]
    return tuple(max(end - start, 1) for start, end in pairwise(ends))

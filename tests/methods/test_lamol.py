from hf_continual import LAMOL

ZERO_TOLERANCE = 0.0
NEEDS_PREDECESSOR = True
EXTRA_FORWARDS = 48  # two batches of samples of 24 tokens each
SHORTER = {"gen_marker": "w57", "answer_marker": "w58"}


def example(world):
    return LAMOL(gamma=0.5, lm_weight=0.5, top_k=0, max_new_tokens=24, batch_rows=8, **SHORTER)


def zero(world):
    return LAMOL(gamma=0, lm_weight=0, **SHORTER)

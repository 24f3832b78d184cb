from hf_continual import LFPT5

ZERO_TOLERANCE = 0.0
NEEDS_PREDECESSOR = True
EXTRA_FORWARDS = 49
SHORTER = {"gen_marker": "w57", "answer_marker": "w58"}


def example(world):
    return LFPT5(
        gamma=0.5,
        lm_weight=0.5,
        top_k=0,
        repetition_penalty=1.0,
        max_new_tokens=24,
        batch_rows=8,
        distill=0.5,
        **SHORTER,
    )


def zero(world):
    return LFPT5(gamma=0, lm_weight=0, distill=0, **SHORTER)

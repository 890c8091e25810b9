"""raygr: LLM scores of items and users inside the sequential recommender you already run.

    from raygr import explain_item, load_recommender

    recommender = load_recommender("outputs/quickstart/train/shipped")
    print(recommender.recommend("S00288", n=5))
    print(explain_item(recommender, "F0182", ["S00288", "S00358"]).sentences())

In a notebook, with DataFrames and without run folders:

    from raygr import fit, prepare_frame

    recommender = fit(prepare_frame(orders), item_scores)
    recommender.recommend(n=5)

The names below are imported when they are first used; `import raygr` itself loads no other library.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raygr.explain.explanation import explain_item as explain_item
    from raygr.finetune.stage import finetune as finetune_llm
    from raygr.frames.fitting import fit as fit
    from raygr.frames.preparing import prepare_frame as prepare_frame
    from raygr.recommend.recommender import load_recommender as load_recommender

__all__ = ["explain_item", "finetune_llm", "fit", "load_recommender", "prepare_frame"]
__version__ = "0.2.0"

# Read when torch is imported. OpenMP's waiting threads spin 300,000 times by default before they sleep, and another
# process on the same cores then makes small operations several times slower (docs/results/speed.md).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def __getattr__(name: str) -> Any:
    match name:
        case "explain_item":
            from raygr.explain.explanation import explain_item

            return explain_item
        case "finetune_llm":  # raygr.finetune is the stage's folder
            from raygr.finetune.stage import finetune

            return finetune
        case "fit":
            from raygr.frames.fitting import fit

            return fit
        case "prepare_frame":
            from raygr.frames.preparing import prepare_frame

            return prepare_frame
        case "load_recommender":
            from raygr.recommend.recommender import load_recommender

            return load_recommender
    raise AttributeError(f"module 'raygr' has no attribute {name!r}")

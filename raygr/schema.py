"""Column names, id conventions and Arrow schemas of every artifact: the pipeline's contract.

Ids: `item_id` and `user_id` are the data set's own strings. `item_index` is 1..I with 0 for
padding; `user_index` is 0..U-1. Timestamps are milliseconds since 1970, or the position where the
data has no clock. `position` counts a user's kept interactions from 0, oldest first.
"""

import json
from collections.abc import Sequence

import pyarrow as pa

PADDING_INDEX = 0

TRAIN, VALIDATION, TEST = "train", "validation", "test"
NEW = "new"  # the part of targets with new items, in the files of a train run
# Candidate sets on data with new items: the new items alone, or the whole catalogue with new items as the model scores
# them, or moved by the calibrated offset.
NEW_ITEMS, WHOLE, CALIBRATED = "new-items", "whole", "whole-calibrated"

# A prepare run: items/ and reviews/ are folders of Parquet parts (they hold text and are streamed);
# interactions.parquet and users.parquet hold ids and numbers only and fit in memory.
ITEMS, REVIEWS, INTERACTIONS, USERS = "items", "reviews", "interactions.parquet", "users.parquet"
STATISTICS = "statistics.json"
# Only with new items: their interactions, which are in none of the other files. New items have the highest item_index.
NEW_INTERACTIONS = "new_interactions.parquet"

ITEM_SCHEMA = pa.schema(
    [
        ("item_index", pa.int32()),
        ("item_id", pa.string()),
        ("title", pa.string()),  # "" where the metadata has none
        ("description", pa.string()),
        ("categories", pa.string()),  # joined by a space, as in the paper's Table 11
        ("details", pa.string()),  # "key: value" pairs joined by a space
        ("train_rating", pa.float32()),  # mean over the train part; null where it has none
        ("train_rating_count", pa.int32()),
        ("all_rating", pa.float32()),  # the metadata's own average, or the mean over all parts
        ("all_rating_count", pa.int32()),
    ]
)
REVIEW_SCHEMA = pa.schema(  # one row per kept interaction, in no particular order
    [
        ("user_index", pa.int32()),
        ("item_index", pa.int32()),
        ("position", pa.int32()),
        ("rating", pa.float32()),
        ("timestamp", pa.int64()),
        ("split", pa.string()),
        ("review_title", pa.string()),
        ("review_text", pa.string()),
    ]
)
INTERACTION_SCHEMA = pa.schema(  # sorted by (user_index, position)
    [
        ("user_index", pa.int32()),
        ("item_index", pa.int32()),
        ("position", pa.int32()),
        ("rating", pa.float32()),  # null for implicit data
        ("timestamp", pa.int64()),
        ("split", pa.string()),
    ]
)
NEW_INTERACTION_SCHEMA = pa.schema(  # sorted by user_index and time
    [
        ("user_index", pa.int32()),
        ("item_index", pa.int32()),
        ("position", pa.int32()),  # number of the user's interactions with other items before it: the history
        ("rating", pa.float32()),  # null for implicit data
        ("timestamp", pa.int64()),
    ]
)
USER_SCHEMA = pa.schema(
    [
        ("user_index", pa.int32()),
        ("user_id", pa.string()),
        ("interactions", pa.int32()),
        ("cutoff", pa.int64()),  # timestamp of the last train interaction
        ("cutoff_position", pa.int32()),  # and its position; -1 where the user has no train part
    ]
)

# A score run: one row per subject, written as a folder of Parquet parts. The names of the aspects stand once in the
# metadata of each part: see score_schema.
SCORES, QUALITY = "scores", "quality.json"
TAUGHT, READ_OUT = "taught", "readout"  # modes of a readout's rows: the table's own score, or one that was read out
ASPECTS = b"aspects"  # the key of the metadata: a JSON list in the order of the scores
NAMED_ONCE = pa.dictionary(pa.int32(), pa.string())
SCORE_SCHEMA = pa.schema(
    [
        ("subject_id", pa.string()),  # item_id or user_id
        ("ratings", pa.list_(pa.int8())),  # integer 1..10 per aspect, null where not read
        ("expected", pa.list_(pa.float32())),  # probability-weighted mean of 1..10, null where not read
        ("reason", pa.string()),  # "ok", or why at least one rating could not be read
        ("completion", pa.string()),  # the model's text; "" in probe mode
        ("prompt_sha256", pa.string()),  # of the prompt's token ids
        ("prompt_tokens", pa.int32()),
        ("cutoff", pa.int64()),  # users: timestamp of the newest review in the prompt; items: null
        ("cutoff_position", pa.int32()),  # users: its position; items: null
        ("model", NAMED_ONCE),
        ("adapter", NAMED_ONCE),  # "" for the bare model
        ("mode", NAMED_ONCE),  # probe, generate, generate-free, or that of a readout's row
    ]
)


def score_schema(aspects: Sequence[str]) -> pa.Schema:
    """SCORE_SCHEMA with the names of the aspects, in the order of the scores."""
    return SCORE_SCHEMA.with_metadata({ASPECTS: json.dumps(list(aspects))})


# A train run.
MODEL, METRICS, RANKS, HISTORY = "model.safetensors", "metrics.json", "ranks.parquet", "epochs.jsonl"
CANDIDATES = "candidates.parquet"
RANK_SCHEMA = pa.schema(  # one row per (target, candidate set); validation has the last target of a user only
    [
        ("user_index", pa.int32()),
        ("position", pa.int32()),  # of the target in the user's history
        ("last", pa.bool_()),  # whether it is the user's last target of the part
        ("part", pa.string()),  # validation, test or new
        ("candidates", pa.string()),  # full, uniform-100, popularity-100, new-items, whole or whole-calibrated
        ("target", pa.int32()),  # item_index
        ("rank", pa.float32()),  # 1 is best; ties share the mean rank
        ("target_train_count", pa.int32()),  # train interactions of the target: the cold-start bucket
    ]
)
CANDIDATE_SCHEMA = pa.schema(  # one row per (user, sampled candidate set), the same for all the user's targets
    [("user_index", pa.int32()), ("candidates", pa.string()), ("items", pa.list_(pa.int32()))]
)

# What a train run keeps for serving: settings and paths, and per line the ids of items and users in the order of
# their index, with the users' whole histories.
SERVING, SERVED_ITEMS, SERVED_USERS = "serving.json", "served_items.parquet", "served_users.parquet"
SERVED_ITEM_SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),
        ("scores", pa.list_(pa.float64())),  # as trained with, NaN where one is missing; null in base models
    ]
)
SERVED_USER_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("items", pa.large_list(pa.int32())),
        ("ratings", pa.large_list(pa.float32())),  # NaN where an interaction has none
    ]
)

# A finetune run; its adapter/ is named in score/adapters.py. One JSON line per step; evaluations of the held-out
# users as means, and per user with columns stage, step, user_index, user_id and one per metric. A run of items also has
# metrics.json, and evaluations per item with columns stage, step, item_index, item_id, expected and teacher.
STEPS, EVALUATIONS, HELD_OUT_EVALUATIONS = "steps.jsonl", "evaluations.json", "evaluations.parquet"

# The curves of a train or finetune run once more, for `tensorboard --logdir <folder of runs>`.
EVENTS, LOGGER_IDS = "events.out.tfevents.raygr", "loggers.json"

# A recommend run: a folder of Parquet parts, the best item of a subject first.
RECOMMENDATIONS = "recommendations"
RECOMMENDATION_SCHEMA = pa.schema(
    [
        ("subject_id", pa.string()),  # user_id or history_id
        ("rank", pa.int32()),  # 1 is the first of the list
        ("item_id", pa.string()),
        ("score", pa.float32()),
    ]
)

# A compare run.
COMPARISON = "comparison.json"

# An export run: each as .parquet (VECTOR rows), .npy and .ids.txt.
ITEM_VECTORS, USER_VECTORS = "item_vectors", "user_vectors"
VECTOR_SCHEMA = pa.schema([("id", pa.string()), ("vector", pa.list_(pa.float32()))])

# An explanation (`raygr explain`): .json, .svg and .png.
EXPLANATION = "explanation"

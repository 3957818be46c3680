"""The schema of all rows: which columns there are, of which kind, and what each means. Every name means one thing.

Functions that measure return rows: a ``pandas.DataFrame`` with one row per number and some of these columns. A column
that a measurement does not have is missing in its rows, so that whole numbers may be stored as floats where rows of
several measurements stand together.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from probe.errors import ProbeError

if TYPE_CHECKING:
    import pandas as pd

#: Stands for a layer's learned sink in the column "key" of maps.
SINK = -1

TEXT, WHOLE, NUMBER, FLAG = "text", "whole number", "number", "yes or no"


class Column(NamedTuple):
    """One column of rows."""

    kind: str  #: "text", "whole number", "number" or "yes or no"
    meaning: str  #: in a sentence


#: The columns of all rows by name.
COLUMNS: dict[str, Column] = {
    "measurement": Column(TEXT, "What was measured; the rows of one measurement have the same columns."),
    "task": Column(TEXT, "The task that the model was trained on."),
    "model": Column(TEXT, "The name of the model; in a study that of its position encoding."),
    "encoding": Column(TEXT, "The position encoding of the model; of a hybrid that of the layers that see one."),
    "seed": Column(WHOLE, "The seed of the training."),
    "replica": Column(WHOLE, "Which of several trainings of one model, 0 for the first."),
    "data": Column(TEXT, "What the models were looked at on: a task, texts, or a file of token ids."),
    "length": Column(WHOLE, "The length of the sequence, in tokens (of a task: what the task calls its length)."),
    "metric": Column(TEXT, "The name of the number."),
    "value": Column(NUMBER, "The number itself, unrounded."),
    "low": Column(
        NUMBER,
        "The lower end of the 95 % interval of the value; what is drawn anew for it, the measurement says.",
    ),
    "high": Column(NUMBER, "The upper end of the 95 % interval of the value."),
    "n": Column(
        WHOLE,
        "How many cases the number is of: sequences, unless the measurement says otherwise (tokens, texts, "
        "prompts, heads, runs).",
    ),
    "n_visible": Column(NUMBER, "How many keys the query sees: all up to its own, or fewer under a sliding window."),
    "split": Column(TEXT, "Which sequences: of accuracy validation or test, of probes how they were divided."),
    "shift": Column(
        WHOLE,
        "As a column: the k that is added to every position, in tokens; of patches, how many places further "
        "on the given position is, and of steering by how many tokens a query is moved. As a metric of "
        "mechanisms: the mean of decoded less true position, in tokens; negative where positions are taken "
        "for earlier ones.",
    ),
    "site": Column(TEXT, "Where in the model: a hook's name in TransformerLens; in tables without blocks. and hook_."),
    "layer_encoding": Column(
        TEXT,
        'The position encoding that the layer sees; "none - rotary" is the difference of two kinds of layers.',
    ),
    "layer_kind": Column(TEXT, "How the layer mixes tokens: attention, recurrence, …; two of them with + between."),
    "layer_window": Column(WHOLE, "How many keys a query of the layer sees at most; missing where it sees all."),
    "layer_sink": Column(FLAG, "Whether a learned sink takes a share of the layer's attention."),
    "probe": Column(TEXT, "The kind of linear probe."),
    "control": Column(TEXT, "What stands beside the model, to be compared with; none is the model itself."),
    "interval": Column(
        TEXT,
        "Over what the interval is: sequences (or texts), trainings (models that were trained alike), both, "
        "or tasks; none where there is no interval.",
    ),
    "n_models": Column(WHOLE, "How many models, trained alike, the value is the mean of."),
    "n_train": Column(WHOLE, "Sequences that the probe was fitted to."),
    "n_test": Column(WHOLE, "Sequences that it was scored on."),
    "target": Column(TEXT, "What a probe is asked to read at each token."),
    "scope": Column(TEXT, "Of what part of the values the number is."),
    "position": Column(NUMBER, "The position of the token, 0 for the first; of several together their mean."),
    "position_end": Column(WHOLE, "Positions p with position <= p < position_end are scored."),
    "alpha": Column(NUMBER, "The strength of the probe's penalty, on features of unit variance."),
    "concept": Column(TEXT, "What is taken out of hidden states."),
    "rank": Column(WHOLE, "How many directions were taken out."),
    "layer": Column(WHOLE, "The number of the layer, 0 for the first."),
    "head": Column(WHOLE, "The number of the head within its layer, 0 for the first."),
    "mechanism": Column(TEXT, "The way in which position might come about. A verdict says whether it does."),
    "verdict": Column(
        TEXT,
        "used: available, and disturbing it moves the decoded position and costs more loss than 19 controls "
        "of equal size. available: position can be read by it. nothing: not established on these sequences.",
    ),
    "intervention": Column(TEXT, "What was done to the tokens, or inside the model, before position was decoded."),
    "template": Column(TEXT, "A pattern that position alone would make. Its distance from a head is the metric's."),
    "n_parameters": Column(WHOLE, "How many numbers of the template are fitted to each head."),
    "slope": Column(
        NUMBER,
        "Of a split of scores: the slope of -f_rel over distances, m of ALiBi, in nats per token. Of a "
        "template: ALiBi's, the same. Of mechanisms: that of the decoded on the true position, 1 where it is "
        "right. Of a law: a of λ = 1 + a ln s.",
    ),
    "explained": Column(
        NUMBER,
        "1 - D(head, template) / D(head, uniform): the share of the head's distance from uniform attention "
        "that the template explains; 1 at most, below 0 where it is further than uniform.",
    ),
    "null_uniform": Column(
        NUMBER,
        "The distance of the head from uniform attention, in the unit of the value: what knows nothing has.",
    ),
    "null_shuffled": Column(
        NUMBER,
        "The distance of the same patterns with the keys of each row shuffled from the template fitted to "
        "them anew: what heads as sharp would have without an order of keys.",
    ),
    "null_shuffled_low": Column(NUMBER, "The lower end of the 95 % interval of null_shuffled."),
    "null_shuffled_high": Column(NUMBER, "The upper end of the 95 % interval of null_shuffled."),
    "null_seed": Column(
        NUMBER,
        "The distance from the nearest head of another seed of the same model, in the same layer.",
    ),
    "null_seed_low": Column(NUMBER, "The lower end of the 95 % interval of null_seed."),
    "null_seed_high": Column(NUMBER, "The upper end of the 95 % interval of null_seed."),
    "label": Column(
        TEXT,
        "What the head's pattern looks like: the first label that holds, of uniform, induction, sink, …, content.",
    ),
    "used_for": Column(
        TEXT,
        "What the head is used for: which replacements of its pattern raise the loss, with an interval above "
        "0 and by at least a twentieth of what the costliest one does.",
    ),
    "part": Column(TEXT, "A part of the split of scores."),
    "content": Column(TEXT, "What of content was fitted: none, or a value for each pair of tokens."),
    "query": Column(NUMBER, "The position of the query, 0 for the first; of several together their mean."),
    "scale": Column(
        NUMBER,
        "λ of softmax(λ q·k / √d): above 1 attention is sharper, 1 is no change (Wang et al. 2024, section 3).",
    ),
    "model_a": Column(TEXT, "The first model of the pair; of an order, the nearer one."),
    "model_b": Column(TEXT, "The second model of the pair; of an order, the further one."),
    "head_a": Column(WHOLE, "The head of the first model in the nearest pair of heads."),
    "head_b": Column(WHOLE, "The head of the second model in the nearest pair of heads."),
    "aggregate": Column(TEXT, "How a layer's distance is made of those of its pairs of heads."),
    "n_seeds_a": Column(WHOLE, "How many training seeds of model_a there are."),
    "n_seeds_b": Column(WHOLE, "How many training seeds of model_b there are."),
    "reference": Column(TEXT, "The model from which both others are measured."),
    "value_a": Column(NUMBER, "The distance of model_a from the reference."),
    "value_b": Column(NUMBER, "The distance of model_b from the reference."),
    "n_seeds_reference": Column(WHOLE, "How many training seeds of the reference there are."),
    "table": Column(TEXT, "The model whose learned T5 bias is the template."),
    "construction": Column(
        TEXT,
        "A set of hand-built weights, or a proposition about such; the claim says what it does.",
    ),
    "claim": Column(TEXT, "What the weights are claimed to do."),
    "quantity": Column(TEXT, "What was measured; of a construction, which part of its claim."),
    "source": Column(TEXT, "The paper, theorem or idea behind the claim."),
    "dtype": Column(TEXT, "The floating-point type of weights and activations."),
    "attention": Column(TEXT, "How attention was computed: explicit softmax, or a fused kernel."),
    "tolerance": Column(NUMBER, "The error up to which the claim holds."),
    "holds": Column(
        FLAG,
        "Whether the largest error is within the tolerance; in tables, in how many checks of how many.",
    ),
    "attention_layers": Column(WHOLE, "How many layers of attention the construction has."),
    "mlp_layers": Column(WHOLE, "How many MLP layers the construction has."),
    "width": Column(NUMBER, "Units of the widest MLP."),
    "first_failure": Column(WHOLE, "The first position, 1 at <bos>, at which the claim fails."),
    "positions_checked": Column(WHOLE, "At how many positions the claim was checked."),
    "variant": Column(TEXT, "How the trained model was changed to reach further."),
    "extension": Column(
        NUMBER,
        "The multiple of the trained length for which a variant was made; missing: for none in particular.",
    ),
    "context": Column(WHOLE, "How many tokens the model is given at once."),
    "tokens": Column(WHOLE, "How many tokens of each text count."),
    "depth": Column(NUMBER, "The share of the text in front of the key, 0…1; missing: all depths together."),
    "n_keys": Column(WHOLE, "How many keys a prompt holds."),
    "p": Column(
        NUMBER,
        "The probability of as much by chance: of a correlation, where heads are paired at random; of an "
        "erased or moved position, the share of random subspaces or directions that do at least as much, "
        "itself among them.",
    ),
    "channel": Column(WHOLE, "The number of the channel of hidden states, 0 for the first."),
    "component": Column(WHOLE, "The number of a principal component, 0 for the largest."),
    "correct": Column(FLAG, "Whether the prediction equals the target."),
    "curve": Column(TEXT, "Which curve of the split of scores: f_abs, g or f_rel."),
    "index": Column(WHOLE, "The key, query or distance at which the curve stands, 0 for the first."),
    "key": Column(WHOLE, "The position of the key, 0 for the first."),
    "lag": Column(WHOLE, "How many positions two vectors are apart."),
    "other": Column(WHOLE, "The position with which it is compared."),
    "pattern": Column(NUMBER, "Attention of the query on the key, in [0, 1]."),
    "template_pattern": Column(NUMBER, "What the template has in the pattern's place, in [0, 1]."),
    "template_distance": Column(
        NUMBER,
        "The change of the distance (nats) between a later layer's patterns and the templates that were "
        "fitted to the model as it is; above 0, attention was positional through what was erased.",
    ),
    "prediction": Column(TEXT, "What the model says, symbols separated by spaces."),
    "share": Column(
        NUMBER,
        "Of a split: the share of the scores' variance that the part explains, averaged over all orders of "
        "adding parts (Lindeman, Merenda & Gold 1980); the shares of a scope sum to 1. Of a table's basis: of "
        "the table's variance.",
    ),
    "step": Column(WHOLE, "The training step after which the checkpoint was written; 0 is before training."),
    "distance": Column(WHOLE, "How many tokens the key lies before the query."),
    "learning_rate": Column(NUMBER, "The learning rate of the step."),
    "loss": Column(
        NUMBER,
        "Cross entropy of the next token, -ln of the probability that the model gives it, mean over the "
        "tokens that count (a task's completions, or all of a text), in nats a token; 0 is best. Where "
        "position is erased it is the change of it.",
    ),
    "mean": Column(NUMBER, "The mean λ over heads."),
    "least": Column(NUMBER, "The least λ of a head."),
    "most": Column(NUMBER, "The largest λ of a head."),
    "reason": Column(TEXT, "Why a measurement was not made."),
    "of": Column(TEXT, "The measurement whose numbers are split by what layers see."),
    "run": Column(TEXT, "The name of the run."),
    "scratchpad": Column(TEXT, "The format of the scratchpad."),
    "a": Column(TEXT, "The encoding from whose accuracy the other's is taken."),
    "b": Column(TEXT, "The encoding whose accuracy is taken from the other's."),
    "p_tasks": Column(
        NUMBER,
        "p of the differences averaged over seeds, task by task: would other tasks show it? With n tasks not below "
        "2^(1 - n).",
    ),
    "p_runs": Column(NUMBER, "p of the differences of single runs: would other seeds of these very tasks show it?"),
    "p_holm": Column(NUMBER, "p over tasks, corrected for the number of pairs (Holm 1979)."),
    "real": Column(FLAG, "Whether the corrected p over tasks is below 5 %."),
    "n_tasks": Column(WHOLE, "How many tasks the number is over."),
    "status": Column(TEXT, "Done or failed."),
    "settings": Column(TEXT, "The settings of the run, as JSON."),
    "train_length": Column(WHOLE, "The longest length that was trained, as the task counts."),
}


def check_rows(rows: "pd.DataFrame", needed: Sequence[str] = ()) -> None:
    """Refuse rows that the schema does not describe.

    Args:
        rows: what a measurement returned.
        needed: columns that they must have.

    Raises:
        ProbeError: for what is no data frame, a column that is unknown or missing, or one whose values are of another
            kind.
    """
    import pandas as pd

    if not isinstance(rows, pd.DataFrame):
        raise ProbeError(f"rows must be a pandas.DataFrame, got {type(rows).__name__}")
    for name in needed:
        if name not in rows:
            raise ProbeError(f"rows must have the column {name!r}, got {', '.join(map(str, rows)) or 'none'}")
    for name in rows:
        if name not in COLUMNS:
            raise ProbeError(f"rows must have columns of the schema, got {name!r}")
        kind, found = COLUMNS[name].kind, _kind_of(rows[name].dropna())
        if found is not None and found != kind and not (kind == NUMBER and found == WHOLE):
            raise ProbeError(f"the column {name!r} must hold a {kind}, got a {found}")


def _kind_of(values: "pd.Series") -> str | None:
    """The kind of a column's values; None where there are none."""
    import numpy as np
    import pandas as pd

    if values.empty:
        return None
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):  # the most, and the quickest
        return WHOLE if (values == values.round()).all() else NUMBER
    if values.map(lambda value: isinstance(value, (bool, np.bool_))).all():
        return FLAG
    if values.map(lambda value: isinstance(value, str)).all():
        return TEXT
    numbers = pd.to_numeric(values, errors="coerce")
    if numbers.isna().any():
        return "mixture of kinds"
    return WHOLE if (numbers == numbers.round()).all() else NUMBER

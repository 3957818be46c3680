"""What every number and name in a report means.

``DEFINITIONS`` has, by the name that stands in rows, what it is: formula, unit, range, and where it comes from. A name
that means different things under different columns has the column behind it, "uniform (template)". Names of columns and
headings of tables are there as well. The functions that measure say the same in their docstrings, with the details.
"""

from collections.abc import Mapping

from probe.errors import ProbeError
from probe.rows import COLUMNS

# Where the values of a column have their definitions, if not under its own name.
VALUES_OF = {
    **dict.fromkeys(("model", "layer_encoding", "layer sees", "table", "model_a", "model_b", "reference"), "encoding"),
    **dict.fromkeys(("nearer", "than", "a", "b"), "encoding"),
    "most often": "template",
    "sequences": "split",
}

# What tables call a name in rows.
SHOWN_AS = {
    "in distribution": "validation (split)",
    "trained lengths": "trained (split)",
    "longer sequences": "longer (split)",
    "nearest template": "jensen_shannon",
    "from uniform": "null_uniform",
    "keys shuffled": "null_shuffled",
    "another seed": "null_seed",
    "fitted parameters": "n_parameters",
    "made for": "extension",
    "best λ": "scale",
    "change of loss, nats": "loss_change",
    "change of exact match": "exact_match_change",
    "on the key": "on_keys",
    "mean R²": "r2",
    "mean reciprocal rank": "mean_reciprocal_rank",
    "mean accuracy": "mean_accuracy",
    "layer sees": "layer_encoding",
    "trained": "none (control)",
    "untrained": "untrained (control)",
    "learned": "none (control)",
    "fresh": "untrained (control)",
    "shuffled": "shuffled (control)",
    "no change": "none (variant)",
    "uniform scale": "uniform (variant)",
    "head scale": "head (variant)",
    "head scale, no limit": "head_free (variant)",
    "head scale, from 1": "head_from_one (variant)",
    "head scale, neither": "head_free_from_one (variant)",
    "head scale, searched": "search (variant)",
    "scale by ln of the length": "log_length (variant)",
    "position interpolation": "linear (variant)",
    "NTK-aware": "ntk (variant)",
    "YaRN": "yarn (variant)",
    "encoding dropped": "dropped (variant)",
    "encoding dropped, scaled": "dropped_uniform (variant)",
}

# What texts and captions say of it, with the name of its definition.
IN_WORDS = {
    "R²": "r2",
    "Exact match": "exact_match",
    "exact match": "exact_match",
    "Jensen–Shannon divergence": "jensen_shannon",
    "Perplexity": "perplexity",
    "perplexity": "perplexity",
    "participation ratio": "participation_ratio",
    "Entropy": "entropy",
    "entropy": "entropy",
    "f_rel": "distance (part)",
    "f_abs": "key (part)",
    "Wilson": "Wilson",
    "bootstrap": "bootstrap",
    "mean reciprocal rank": "mean_reciprocal_rank",
    "Mean reciprocal rank": "mean_reciprocal_rank",
}

_INTERVALS = {
    "bootstrap": (
        "Intervals from drawing what was measured (sequences, texts, heads, runs) anew, with replacement, many times: "
        "the middle 95 % of the results (Efron & Tibshirani 1993). Differences are paired: both sides get the same "
        "draws."
    ),
    "Wilson": (
        "Wilson's score interval of a share of n cases, 95 %: it stays within 0…1, and is of some width for 0 of n."
    ),
}

_ACCURACY = {
    "accuracy (measurement)": "How often a model completes held-out sequences exactly, by length, decoding greedily.",
    "exact_match": (
        "The share of sequences whose completion equals the target, token by token and in length; 0…1, 1 is best. Of "
        "accuracy and passkeys the model decodes greedily; elsewhere the right tokens stand before each, and all "
        "scored ones must be the likeliest, which is the same. Where position is erased it is the change of it."
    ),
    "exact_match_change": "Exact match less that of the model as it is, paired over sequences; -1…1.",
    "token_accuracy": (
        "The share of scored tokens that are the likeliest, given the right tokens before; 0…1. Where position is "
        "erased it is the change of it."
    ),
    "token_accuracy_change": "Token accuracy less that of the model as it is, paired over sequences; -1…1.",
    "steps_exact": "The share of sequences whose scratchpad is right in every step; 0…1.",
    "right_answer_wrong_steps": "The share of sequences with a right answer after wrong steps in the scratchpad; 0…1.",
    "loss_change": (
        "The loss less that of the model as it is (without the disturbance, the shift, the scale), on the same "
        "sequences, paired; nats a token, above 0 is worse."
    ),
    "shifted (measurement)": (
        "The same sequences with every position p taken for p + k. What depends on no position, or on distances "
        "alone, stays the same; learned and sinusoidal positions need not (Sinha et al. 2022)."
    ),
    "over_training (measurement)": "Probes and loss at every checkpoint that a run kept.",
}

_PROBES = {
    "probe (measurement)": "Linear probes of the position at the embedding and behind every layer, beside controls.",
    "fit (measurement)": "Ridge probes of several targets at every site and head, beside five controls.",
    "extrapolation (measurement)": (
        "Ridge probes behind the last layer, fitted to the first part of the sequences and scored by position on up "
        "to four times as many tokens."
    ),
    "r2": (
        "R² = 1 - Σ e² / Σ (y - ȳ)² on held-out sequences, e the error of the prediction, y the target: 1 is perfect, "
        "0 what the mean reaches, below 0 is worse. Of a law of λ: of the λ that were fitted."
    ),
    "mean_absolute_error": "Mean |predicted - true| in the target's unit (tokens for the position); 0 is best.",
    "mean_squared_error": "Mean (predicted - true)², in the target's unit squared; 0 is best.",
    "accuracy": "The share of tokens whose position the classifier names exactly; 0…1.",
    "selectivity": (
        "What the model has more than the control of this row: its R² (of the classifier, its accuracy) less the "
        "control's, paired over test sequences. What stands above the untrained control was learned."
    ),
    "ridge (probe)": (
        "Linear regression with a penalty α ‖w‖² on features of unit variance, α chosen by cross-validation between "
        "training sequences."
    ),
    "logistic (probe)": "Linear classification of the position by softmax, one class a position, α = 1.",
    "none (control)": "The model itself, as it was trained.",
    "untrained (control)": (
        "The same measured on a model of the same architecture with fresh weights: nothing is learned."
    ),
    "embedding (control)": "The same probe on the token embedding alone, which knows which token it is but not where.",
    "shuffled (control)": (
        "The same values with their places dealt out anew: positions among the tokens of each sequence, or the "
        "vectors of a table among positions. What chance gives."
    ),
    "random (control)": (
        "Of probes: a fixed Gaussian projection of the one-hot token, an embedding nobody trained. Of erasure and "
        "patching: the mean over random subspaces of the same rank. Of steering: over directions of the same length."
    ),
    "position (target)": "The position p of the token, 0 for the first, in tokens.",
    "log_position (target)": "ln(1 + p).",
    "inverse_position (target)": "1/(p + 1): what uniform attention puts on <bos> (Kazemnejad et al. 2023, Theorem 1).",
    "fourier (target)": "sin 2πp/T and cos 2πp/T for periods T that are powers of two.",
    "relative_to_separator (target)": "The signed distance to the first separator, in tokens, negative before it.",
    "relative_to_end (target)": (
        "The signed distance to the last token, in tokens, 0 there; a causal model has to guess it."
    ),
    "count (target)": "How often the counted token has occurred so far, this place included.",
    "sequence (split)": "Whole sequences are split: probes are fitted to some and scored on others.",
    "length (split)": "Besides, only the first tokens are fitted to, and later ones are scored as well.",
    "distribution (split)": "Fitted to one set of sequences and scored on another.",
    "all (scope)": "All positions; of the split of scores, all of the scores' variance.",
    "fitted (scope)": "Positions as far as the probe was fitted to them.",
    "beyond (scope)": "Positions beyond those that the probe was fitted to.",
    "bin (scope)": "A bin of positions, from position up to position_end; its R² is about the bin's own mean.",
}

_USE = {
    "use (measurement)": (
        "What changes in the model when position is taken out of the stream before a layer, by least-squares concept "
        "erasure (LEACE, Belrose et al. 2023), beside random subspaces of the same rank."
    ),
    "position (concept)": "Position as a number: after erasure, of one direction, no linear regression finds it.",
    "classes (concept)": (
        "Position as classes: after erasure, of up to T - 2 directions, no linear classifier finds it."
    ),
    "probe_r2": (
        "R² of the position by ridge probes of the edited states, on other sequences than those that the erasure was "
        "fitted to: what is left. Not a change. Of states less the mean state of their token."
    ),
    "probe_r2_before": (
        "The same R² in the unedited states: what there was to erase. Of steering and patching: of states less what "
        "their token adds beside what their position adds."
    ),
    "loss_of_exchange": (
        "The change of the loss where the position part of each token is that of the same place in another sequence, "
        "in the rows that a shift patches; nats a token. Position alone costs nothing there."
    ),
    "loss_beyond_exchange": (
        "The loss with the position part of a place some tokens further on in another sequence, less that with the "
        "part of the same place of that sequence, in the same rows; nats a token, paired."
    ),
    "decoded_shift": (
        "By how many tokens the position that a probe reads behind a later layer moves in patched rows; the shift "
        "where that layer takes it over."
    ),
    "attention_moved": (
        "By how many tokens a head's mean attended place moves for each token by which the position in its query is "
        "moved: 1 where attention follows, 0 where it stands still, below 0 where it goes the other way."
    ),
    "attended": "The mean attended place of the moved query among the keys before it, in tokens.",
    "follows": "The head's attended place moves with the position in its query, at least half as far, beyond chance.",
    "does not follow": "It was not established that the head's attended place moves with the position in its query.",
    "not used": "It was not established that the model uses the position at that site.",
}

_GEOMETRY = {
    "geometry (measurement)": (
        "Hidden states split as h = μ + pos_t + ctx_c + tok_x + rest (Song & Zhong 2023), and how the variance of "
        "attention outputs falls with the position."
    ),
    "share_position": (
        "The share of Σ ‖h - μ‖² that the mean at each position explains; 0…1. A mean of n sequences carries 1/n of "
        "the rest's variance by chance: see the shuffled control."
    ),
    "share_context": "The share that the mean of each sequence explains of what position leaves; 0…1.",
    "share_token": "The share that the mean over equal tokens explains of what position and sequence leave; 0…1.",
    "share_residual": "The share that position, sequence and token leave unexplained; 0…1.",
    "participation_ratio": (
        "(Σ λ)² / Σ λ², λ the eigenvalues of the covariance of the position part (of a table: of its vectors): how "
        "many dimensions it fills, 1…d_model."
    ),
    "components_95": "The least number of principal components that have 95 % of the variance.",
    "variance": (
        "The variance over sequences at one position, averaged over coordinates, in the unit of the site squared."
    ),
    "exponent": (
        "a of the fit ln variance = b - a ln(t + 1), t + 1 the number of keys: 1 for the mean of independent values, "
        "0 for a single key (Chi et al. 2023)."
    ),
    "exponent_r2": "R² of that fit of the exponent; 0…1.",
    "table (measurement)": "The vectors of positions that a model adds to its embeddings.",
    "table_basis (measurement)": "The table of positions along its principal components.",
    "table_map (measurement)": "Cosine similarity of every two vectors of the table of positions, less their mean.",
    "norm": "‖E_p‖, the length of a position's vector.",
    "coordinate": "The coordinate of a position's vector along a principal component of the table.",
    "cosine": "The cosine of two positions' vectors, less the mean vector; -1…1.",
    "similarity": "The mean cosine of vectors k = lag positions apart, less the mean vector; -1…1.",
    "low_frequencies_90": (
        "The share of the frequencies of a cosine transform along positions, from the lowest on, that has 90 % of the "
        "variance: little for a smooth curve, .9 for white noise."
    ),
}

_MECHANISM = {
    "mechanism (measurement)": "Interventions that tell by which mechanism a model knows position, and their verdicts.",
    "position (mechanism)": (
        "Position can be read (R² ≥ 0.3) where the token embedding does not tell it already; used, if one of the "
        "mechanisms is."
    ),
    "bos_counter (mechanism)": (
        "Attention to <bos> falls as 1/t and so counts (Kazemnejad et al. 2023, Theorem 1): it dies without <bos>, "
        "runs slow with a second one, and a head's log-odds on the first key have slope -1 in ln of the other keys."
    ),
    "variance_decay (mechanism)": (
        "The norm of attention outputs shrinks with the position (Chi et al. 2023): ln t can be read from it on "
        "random content without <bos>."
    ),
    "neighbour_similarity (mechanism)": (
        "Hidden states are the more alike the nearer their positions (Zuo et al. 2025), and position is lost where "
        "neighbours come from other sequences."
    ),
    "attention_sink (mechanism)": (
        "Heads rest on the first key without counting, and the position is lost where they are cut off from it."
    ),
    "encoding (mechanism)": (
        "Position can be read from one token repeated without <bos>, which only an encoding allows."
    ),
    "used": (
        "Of a mechanism: available, and disturbing it moves the decoded position and costs more loss than controls of "
        "equal size. Of erased or exchanged position: it can be read, and the loss rises beyond the control."
    ),
    "available": "Position can be read by this mechanism; whether the model uses it was not shown.",
    "nothing (verdict)": "Not established on these sequences.",
    "normal (intervention)": "Nothing was changed.",
    "drop_bos (intervention)": "Another token in place of <bos>.",
    "double_bos (intervention)": "A second <bos> behind the first: a counter then reads half the position.",
    "move_bos (intervention)": "<bos> changes places with the token at a quarter of the length.",
    "constant (intervention)": "One token again and again after the first.",
    "constant_without_bos (intervention)": "One token again and again: without an encoding all positions are alike.",
    "permuted (intervention)": "The tokens after the first in random order.",
    "permuted_without_bos (intervention)": "Random content and nothing else: no <bos>, no order.",
    "uniform_first_layer (intervention)": "Attention in the first layer is uniform over the keys that a query sees.",
    "double_odds (intervention)": "The odds of the first key are doubled in every head.",
    "window (intervention)": "Queries see only the last keys, so that the first token is out of sight.",
    "strangers (intervention)": "Behind layer 0 each position has the state of the same position in another sequence.",
    "strangers_without_bos (intervention)": "The same with random content without <bos>.",
    "standing_still (intervention)": "All tokens stand at one position, the middle one: the encoding tells nothing.",
    "states_moved": (
        "How much of the states' squares, about their mean, moves when all tokens stand at one position; at least 0."
    ),
    "disturbed (intervention)": "The attention output of one layer is changed so that it tells another position.",
    "cut_sinks (intervention)": "The first key is hidden from a layer's sinks.",
    "r2_refitted": "R² of a probe that was fitted under the intervention: whether anything of position is left.",
    "log_odds_slope": (
        "The slope of a head's log-odds on the first key over ln of the number of others: -1 counts exactly."
    ),
    "attention_on_first": "The mean attention of that head on the first key; 0…1.",
    "loss_gain": (
        "How much better the model predicts than token frequencies, nats a scored token; an untrained model gains "
        "nothing."
    ),
    "loss_change_control": "The mean change of the loss under the controls, as large elsewhere; nats a token.",
    "loss_beyond_control": "What the disturbance costs more than the mean of its controls, nats a token, paired.",
    "controls_exceeded": "The share of the 19 controls that cost less than the disturbance; 0…1.",
    "decoded_moved": "By how many tokens the disturbance moves the decoded position.",
    "decoded_moved_control": "By how many tokens the controls move it, on average.",
    "variance_exponent": "The exponent with which the variance of layer 0's attention output falls on random content.",
    "r2_log_position_from_norm": "R² of ln t read from the norm of that output at one token alone.",
    "spearman_of_similarity": "Spearman's correlation of the similarity of two states with how near they are; -1…1.",
}

_TEMPLATES = {
    "templates (measurement)": (
        "The distance of every head from every template; fitted ones are fitted to half of the sequences, and all are "
        "measured on the other half."
    ),
    "trained_t5 (measurement)": (
        "The distance of every head from the bias that the study's model with T5's encoding learned."
    ),
    "jensen_shannon": (
        "Jensen–Shannon divergence, H((P + Q)/2) - (H(P) + H(Q))/2 of two rows of attention, mean over queries and "
        "sequences; nats, from 0 (equal) to ln 2 = 0.693 (no key in common). Lin 1991; Kazemnejad et al. 2023, §5.2."
    ),
    "symmetric_kl": "KL(P‖Q) + KL(Q‖P), nats, 0…∞. Jeffreys 1946.",
    "total_variation": "½ Σ |p - q|: the attention that would have to be moved; 0…1.",
    "hellinger": "(½ Σ (√p - √q)²)^½; 0…1.",
    "wasserstein": "How far attention has to be carried on average, Σ |Σ (p - q)|, in tokens.",
    "mcgill_compat": (
        "½ (KL(M‖P) + KL(M‖Q)), M = (P + Q)/2, nats, 0…∞: what the released code of Kazemnejad et al. 2023 calls JSD."
    ),
    "uniform (template)": "1/t on each of the t keys that a query sees. No parameters.",
    "previous_token (template)": "All attention on the key before the query. No parameters.",
    "diagonal (template)": "All attention on the query's own key. No parameters.",
    "first_token (template)": "All attention on the first key. No parameters.",
    "alibi (template)": "softmax(-m (t - i)) with ALiBi's own slope m of each head. No parameters. Press et al. 2022.",
    "t5 (template)": (
        "softmax of the bias that a trained model with T5's encoding has learned, each head's own column. No "
        "parameters. Raffel et al. 2020."
    ),
    "previous_token_leaky": "A bias on the key before the query, the rest uniform; its log-odds are fitted.",
    "diagonal_leaky": "A bias on the query's own key, the rest uniform; its log-odds are fitted.",
    "first_token_sink": (
        "A bias on the first key, the rest uniform; its log-odds are fitted. What counts position without encodings."
    ),
    "alibi_fitted": "softmax(-m (t - i)), with the slope m of each head fitted; negative where it prefers far keys.",
    "power_law": "Attention as (1 + t - i)^-a, with the exponent a of each head fitted.",
    "window (template)": "A bias on the w nearest keys; width and log-odds are fitted.",
    "sink_alibi": "A fitted share of each row on the first key, the rest as alibi_fitted.",
    "rotary_fitted": (
        "softmax of a sum of 16 cosines of the distance, their weights fitted: what rotary kernels are made of."
    ),
    "t5_fitted": "softmax of a bias by T5's 32 buckets of distances, all fitted. Raffel et al. 2020.",
    "sink_t5": "A fitted share of each row on the first key, the rest as t5_fitted.",
    "most often": "The template that is the nearest one of most heads.",
}

_SPLIT = {
    "split (measurement)": (
        "Scores before the softmax as μ + f_abs(key) + g(query) + f_rel(distance) + content, by least squares over "
        "all held-out sequences (the form of Kazemnejad et al. 2023, Theorem 2)."
    ),
    "key (part)": "f_abs(i), by the position of the key alone; without a slope, which f_rel has by convention.",
    "query (part)": "g(t), by the position of the query alone; softmax does not see it.",
    "distance (part)": "f_rel(t - i), by the distance of the key from the query alone.",
    "residual (part)": "What the other parts leave: content, and noise.",
    "content (part)": "One value for each pair of a query's and a key's token.",
    "seen (scope)": "Of each score less the mean of its row, in its sequence: softmax sees nothing else.",
    "mean (scope)": (
        "Of scores: of their means over sequences, without content. Of distances between models: over layers."
    ),
    "toeplitz_r2": (
        "The share of the scores' variance within rows that f_rel alone explains (scope mean: of the mean scores'); "
        "0…1."
    ),
    "alibi_r2": "R² of a straight line, ALiBi's form, for f_rel; 0…1.",
    "logarithm_r2": "R² of a multiple of ln(1 + distance) for f_rel; 0…1.",
    "t5_r2": "R² of T5's 32 buckets for f_rel; 0…1.",
    "f_rel, share within rows": "The share of the scores' variance within rows that the distance explains; 0…1.",
    "f_abs, share within rows": "The share of the scores' variance within rows that the key's position explains; 0…1.",
    "content, share within rows": "The share of the scores' variance within rows that position leaves to content; 0…1.",
    "R² of f_rel alone (Toeplitz)": "The share of the scores' variance within rows that f_rel alone explains; 0…1.",
    "the same of mean scores": "The same after content is averaged out over sequences; 0…1.",
    "R² of a line for f_rel": "How much of f_rel a straight line, ALiBi's form, explains; 0…1.",
    "R² of T5's buckets for f_rel": "How much of f_rel's variation T5's 32 buckets of distances explain; 0…1.",
    "entropy (measurement)": "How spread out, and how far, the attention of every head is, by query.",
    "entropy": "-Σ p ln p of a row of attention, in nats, from 0 (one key) to ln(query + 1) (uniform).",
    "mean_distance": "Σ p_i (t - i), the mean distance that a head attends to, in tokens.",
    "first": "Attention on the first key; 0…1.",
    "previous": "Attention on the key before the query; 0…1.",
    "self": "Attention on the query's own key; 0…1.",
}

_CENSUS = {
    "census (measurement)": (
        "A label for every head, how well it fits, and what the model loses without the head's pattern."
    ),
    "sink": "Mean attention on the first key; as a label, at least half.",
    "learned_sink": "The mean share of a head's attention that its learned sink takes; as a label, at least half.",
    "previous_token (metric)": "Mean attention on the key before the query; 0…1.",
    "previous_token (label)": "At least half of the attention is on the key before the query.",
    "diagonal (metric)": "Mean attention on the query's own key; 0…1.",
    "diagonal (label)": "At least half of the attention is on the query's own key.",
    "uniform (metric)": "Mean entropy as a share of the greatest, ln n for n visible keys; 1 is uniform attention.",
    "uniform (label)": "The entropy is at least 99 % of that of uniform attention.",
    "window (metric)": "The share of the divergence from uniform that a fitted window explains; 0…1.",
    "window (label)": "A window of the nearest keys explains at least half of the divergence from uniform.",
    "decay": (
        "The share of the divergence from uniform that exponential or power-law decay explains, the better of both; "
        "0…1. As a label: it explains at least half, and best."
    ),
    "relative": (
        "No simple template explains half of the divergence from uniform, but T5's buckets, or a sink beside them, do."
    ),
    "induction (metric)": (
        "Mean attention on keys that follow an earlier occurrence of the query's token, over queries that have such; "
        "0…1. Olsson et al. 2022."
    ),
    "induction (label)": "At least half of the attention is on such keys, and twice what the best template puts there.",
    "induction_expected": "What the head's best positional template would put on such keys; 0…1.",
    "duplicate (metric)": "Attention on earlier keys that hold the query's own token; 0…1.",
    "duplicate (label)": "At least half of the attention is on such keys, and twice what the best template puts there.",
    "duplicate_expected": "What the head's best positional template would put on such keys; 0…1.",
    "content (metric)": "The share of the divergence from uniform that the best positional template leaves; 0…1.",
    "content (label)": "Position explains less than half of the divergence from uniform: the head looks at content.",
    "explained_variance": "1 - Σ (pattern - template)² / Σ (pattern - uniform)² of the best template; 1 at most.",
    "loss_without_content": "The change of the loss when the head's pattern is its best template; nats a token.",
    "loss_without_position": (
        "The change of the loss when the template in the head's pattern is replaced by uniform; nats a token."
    ),
    "loss_uniform": "The change of the loss when the head's attention is uniform; nats a token.",
    "loss_output_without_content": (
        "The change of the loss when a uniform head's output is its mean over other sequences at each position; nats a "
        "token."
    ),
    "loss_output_without_position": (
        "The change of the loss when what position adds to a uniform head's mean output is taken from it; nats a token."
    ),
    "loss_output_mean": (
        "The change of the loss when a uniform head's output is its mean over sequences and positions; nats a token."
    ),
    "head_detector_previous_token": "TransformerLens's own score of the same kind; 0…1.",
    "head_detector_induction": "TransformerLens's own score of the same kind; 0…1.",
    "content (used_for)": (
        "The loss rises where content is taken out of the head's pattern; of a uniform head, out of its output."
    ),
    "position (used_for)": (
        "The loss rises where position is taken out of the head's pattern; of a uniform head, out of its output."
    ),
    "both": "The loss rises where content is taken out of the pattern, and where position is.",
    "either": "The loss rises only where both are taken out: each can stand in for the other.",
    "nothing (used_for)": "No replacement of the pattern raises the loss.",
    "not ablated": "The head's pattern was not replaced.",
    "used for content": "Heads where the loss rises when content is taken out of the pattern.",
    "used for position": "Heads where the loss rises when position is taken out of the pattern.",
    "used for both": "Heads where the loss rises when content is taken out, and when position is.",
    "used for either": "Heads where the loss rises only when both are taken out.",
    "used for nothing": "Heads whose pattern can be replaced without a rise of the loss.",
}

_MODELS = {
    "model_distance (measurement)": (
        "How far the attention of two models is apart: at each layer from the distances of all pairs of heads, then "
        "the mean over layers (Kazemnejad et al. 2023, §5.2)."
    ),
    "model_order (measurement)": "Which of two models is nearer to a third one, paired over sequences and seeds.",
    "minimum (aggregate)": "The nearest pair of heads of each layer, as in the paper.",
    "matching (aggregate)": "The mean over the best one-to-one matching of heads.",
    "mcgill (aggregate)": "The minimum over pairs h < h′ only, as the paper's released code has it.",
    "layer (scope)": "Of one layer.",
    "head_b": "The head of model_b in the nearest pair.",
    "nearer": "Of the two models the one whose attention is nearer to the reference.",
    "than": "The other one of the two.",
    "by": "By how much nearer, in nats; an interval that does not hold 0 tells the two apart.",
    "pair": "The two models whose attention is compared.",
    "needle (measurement)": "What heads attend to from the end of a prompt that asks for a hidden key.",
    "on_keys": "Attention on the key that is asked for; 0…1.",
    "on_keys_uniform": "What uniform attention has there: the control.",
    "on_first": "Attention on the first token; 0…1.",
    "on_sink": "The share of attention that the layer's learned sink takes; 0…1.",
    "on_recent": "Attention on the last 16 tokens; 0…1.",
    "elsewhere": "Attention on all other tokens; 0…1.",
    "reach": "The mean attended distance beside that of uniform attention, Σ p_i (t - i) / (t / 2); 0…2.",
    "by_layer_encoding (measurement)": (
        "Means over the heads of layers that see an encoding, of those that see none, and their difference; bootstrap "
        "over heads."
    ),
}

_CONSTRUCTIONS = {
    "construction (measurement)": (
        "Weights written by hand after a theorem, and what they do in the decoder that trains."
    ),
    "largest_error": "How far the decoder is from the claim at the worst position, in the unit of the quantity.",
    "largest error / tolerance": "The largest error of all checks as a share of its tolerance; a claim holds up to 1.",
    "dtypes": "The floating-point types in which it was checked.",
    "checked to length": "The longest sequence of a check, in tokens; the claim may go further.",
}

_BEYOND = {
    "perplexity (measurement)": "The loss of the same tokens of held-out texts under windows of different contexts.",
    "perplexity": (
        "exp of the mean loss, in nats, of a token: how many equally likely tokens would be as hard; 1 is best."
    ),
    "bits": "The mean loss of a token in bits: nats / ln 2.",
    "loss_by_position (measurement)": "The loss of a token by its place in one window that holds the whole text.",
    "passkey (measurement)": (
        "How often a model says a key of digits that is hidden in a text (Mohtashami & Jaggi 2023)."
    ),
    "digits": "The share of the key's digits that are right in their place; 0…1.",
    "temperature (measurement)": "Loss and exact match under one temperature λ for the whole model.",
    "head_scale (measurement)": "The λ that was found for each head, or for the model, and each extension.",
    "scale_law (measurement)": (
        "The law λ = 1 + a ln s of the scales that were found; Wang et al. 2024 have a = 0.3973."
    ),
    "scaled_entropy (measurement)": "Entropy of every head's attention by query, beyond the trained length.",
    "entropy_rise (measurement)": "How much more entropy heads have at an extended length than at the trained one.",
    "entropy_rise": "A head's mean entropy at the extended length less that at the trained one, in nats.",
    "scale_entropy (measurement)": "Whether heads whose entropy rises more get a larger λ: correlations over heads.",
    "pearson": "Pearson's correlation over heads of λ with the rise of entropy; -1…1.",
    "spearman": "Spearman's rank correlation over heads of λ with the rise of entropy; -1…1.",
    "pearson_entropy": "Pearson's correlation over heads of λ with the entropy itself; -1…1.",
    "spearman_entropy": "Spearman's rank correlation over heads of λ with the entropy itself; -1…1.",
    "none (variant)": "The model as it was trained.",
    "uniform (variant)": "One λ for all heads, the best of a grid on validation texts.",
    "head (variant)": "One λ a head, trained with all weights frozen, λ ≥ 1 (Wang et al. 2024).",
    "head_free (variant)": "The same without the limit λ ≥ 1.",
    "head_from_one (variant)": "The same from λ = 1 on instead of the best uniform scale.",
    "head_free_from_one (variant)": "The same without limit and from λ = 1 on.",
    "search (variant)": "One λ a head, searched without gradients.",
    "log_length (variant)": "λ = 1 + a ln(n / L) for a query that sees n > L keys, L the trained length.",
    "linear (variant)": "Position interpolation of rotary angles: all divided by the factor. Chen et al. 2023.",
    "ntk (variant)": "NTK-aware rotary angles: a larger base. bloc97 2023.",
    "yarn (variant)": "YaRN: slow rotary planes interpolated, fast ones kept, attention sharpened. Peng et al. 2023.",
    "dropped (variant)": "The encoding is taken out, and training goes on for some steps. Gelberg et al. 2025.",
    "dropped_uniform (variant)": "The encoding is taken out, and one λ is found for all heads besides.",
    "trained (split)": "Held-out sequences of the trained lengths.",
    "longer (split)": "Held-out sequences of the test set, longer than those trained.",
}

_LEAGUE = {
    "mean_reciprocal_rank": (
        "1 / rank of the encoding by accuracy beyond the trained lengths, mean over (task, seed), every task alike; 1 "
        "is always first. Ties share. Kazemnejad et al. 2023, figure 2."
    ),
    "mean_accuracy": "Exact match beyond the trained lengths, mean over the same runs; 0…1.",
}

_ENCODINGS = {
    "none (encoding)": "No position encoding (NoPE): only the causal mask. Kazemnejad et al. 2023.",
    "learned (encoding)": "A learned vector for each position, added to the embedding.",
    "sinusoidal (encoding)": "Sines and cosines of the position, added to the embedding. Vaswani et al. 2017.",
    "t5 (encoding)": (
        "A learned bias for each bucket of distances and each head, added to the scores. Raffel et al. 2020."
    ),
    "alibi (encoding)": "The bias -m (query - key), a fixed slope m a head. Press et al. 2022.",
    "rotary (encoding)": "Queries and keys turned by angles that grow with the position. Su et al. 2021.",
    "alibi_learned (encoding)": "ALiBi with learned slopes.",
    "alibi_keys (encoding)": "ALiBi as an absolute bias m i on keys, which softmax cannot tell from it.",
    "transformer_xl (encoding)": "Learned biases and sinusoids of the distance, read by the query. Dai et al. 2019.",
    "fire (encoding)": "A small network of the distance, scaled by the query's position, as bias. Li et al. 2024.",
    "kerple (encoding)": "The bias -r₁ ln(1 + r₂ d) or -r₁ d^r₂ of the distance d, learned. Chi et al. 2022.",
    "sandwich (encoding)": "A sum of cosines of the distance as bias, without parameters. Chi et al. 2023.",
    "xpos (encoding)": "Rotary positions that fade with the distance. Sun et al. 2022.",
    "cope (encoding)": "Positions counted by gates that depend on content. Golovneva et al. 2024.",
    "randomized (encoding)": (
        "Another encoding whose positions are drawn, in order, from a longer range. Ruoss et al. 2023."
    ),
}

_COLUMNS = {
    "failed": "The measurement failed; the column reason says why, and the others stand.",
    "skipped": "The model or the sequences cannot give what the measurement needs; the column reason says what.",
    "validation (split)": "Held-out sequences of trained lengths: in distribution.",
    "test (split)": "The test set: held-out sequences of lengths that go beyond those trained.",
}

DEFINITIONS: dict[str, str] = {
    **{name: column.meaning for name, column in COLUMNS.items()},
    **_COLUMNS,
    **_INTERVALS,
    **_ENCODINGS,
    **_ACCURACY,
    **_PROBES,
    **_USE,
    **_GEOMETRY,
    **_MECHANISM,
    **_TEMPLATES,
    **_SPLIT,
    **_CENSUS,
    **_MODELS,
    **_CONSTRUCTIONS,
    **_BEYOND,
    **_LEAGUE,
}


def define(names: Mapping[str, str]) -> None:
    """Add definitions of names that rows of a measurement of one's own have.

    Args:
        names: what each name means.

    Raises:
        ProbeError: for a name that is defined otherwise already.
    """
    for name, meaning in names.items():
        if DEFINITIONS.setdefault(name, meaning) != meaning:
            raise ProbeError(f"the name {name!r} is defined already: {DEFINITIONS[name]!r}; choose another name")


def definition_of(name: str, of: str | None = None) -> str | None:
    """The key of a name's definition, of a name under a column where that matters; None where there is none.

    Underscores may be spaces, as tables have them, and what stands behind a name's first point ("fourier.cos_4") may
    be left out. The name of a model is its user's own, so it is defined only where it is that of an encoding.
    """
    of = VALUES_OF.get(of or "", of)
    if of == "encoding":
        return f"{name} (encoding)" if f"{name} (encoding)" in DEFINITIONS else None
    for each in (name, name.replace(" ", "_"), name.partition(".")[0]):
        for key in (f"{each} ({of})", each, SHOWN_AS.get(f"{each} ({of})"), SHOWN_AS.get(each)):
            if key in DEFINITIONS:
                return key
    return None

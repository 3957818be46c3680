"""Every decoder of the installed transformers that can be made tiny: what a new release breaks is seen here."""

import pytest
import transformers
from decoder_classes import VARIANTS, build, kinds

from probe.errors import ProbeError
from probe.models.families import FAMILIES
from probe.models.open.kinds import KINDS, KINDS_OF
from probe.models.open.wrapping import wrap
from probe.models.protocol import layers_in_words

NEVER_ASKED = "never asks it for attention"
# Kinds that are refused, and what the line says.
REFUSED = {
    # without attention
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"), NEVER_ASKED),
    # with an attention of their own, that transformers' registry does not know; the first three load as ours
    **dict.fromkeys(("bloom", "falcon", "mpt"), NEVER_ASKED),
    **dict.fromkeys(("bailing_hybrid", "cpmant", "gpt_neo", "gpt_neox_japanese", "openai-gpt"), NEVER_ASKED),
    **dict.fromkeys(("xglm", "xlm"), NEVER_ASKED),
    # with attention to what is no token: compressed keys, or the outputs of earlier layers
    **dict.fromkeys(("deepseek_v4", "inkling2_loop_text", "inkling2_text"), "attention must go from tokens to tokens"),
    "longcat_flash": "a block must have one attention",
}
# Kinds of which transformers gives out no pattern of each layer.
WITHOUT_PATTERNS = ()
# Kinds that decoder_classes can't make.
NOT_BUILT = {
    "blt": "reads bytes and patches of them",
    "dbrx": "its config has its sizes in configs of its own",
    "dots3_note_text": "its experts have sizes of their own in every layer",
    "xlnet": "predicts tokens in any order",
}


@pytest.mark.parametrize("kind", [kind for kind in kinds() if kind not in NOT_BUILT])
def test_a_kind_loads_and_is_checked_or_is_refused_by_name(kind):
    """``wrap`` itself holds logits, patterns and edits against eager attention."""
    model = build(kind)
    if kind in REFUSED:
        with pytest.raises(ProbeError, match=REFUSED[kind]) as caught:
            wrap(model)
        assert "\n" not in str(caught.value)
    else:
        errors = wrap(model).errors
        assert errors.logits < 1e-5 and errors.patterns < 1e-5
        assert errors.n_patterns or kind in WITHOUT_PATTERNS


def test_refused_kinds_are_those_that_there_are():
    known = {*kinds(), *VARIANTS}
    assert REFUSED.keys() <= known
    assert not REFUSED.keys() & NOT_BUILT.keys() and not REFUSED.keys() & KINDS.keys()


@pytest.mark.skipif(transformers.__version__ != KINDS_OF, reason="KINDS is of another version")
def test_the_table_of_kinds_is_complete():
    loaded = {*kinds()} - {*REFUSED} - {*NOT_BUILT} - {*VARIANTS} - {*FAMILIES}
    assert KINDS.keys() == loaded


@pytest.mark.parametrize("kind", ["afmoe", "gpt_oss", "jamba", "zamba2", "ctrl"])
def test_the_table_of_kinds_says_what_the_layers_are(kind):
    assert layers_in_words(wrap(build(kind)).anatomy.layers) == KINDS[kind]

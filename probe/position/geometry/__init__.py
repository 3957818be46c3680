"""The geometry of position: what part of hidden states it is, in how many dimensions, and how it changes with t.

Every function takes what ``trace`` returns and gives rows; nothing is fitted that a probe could overfit. Beside the
model ("none") stand two controls: "shuffled", the same hidden states at positions that were permuted within each
sequence, and, where its trace is given, "untrained". Positions are 0-based. The first ``skip`` of them are left out:
a ``<bos>`` tells its position by its token.

Intervals of shares are the jackknife's: a draw with replacement repeats sequences, so that its means are noisier than
the sample's. The others are percentiles of such draws, moved by what the draws' mean is off the value.
"""

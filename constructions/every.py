"""The constructions of all files, by name."""

from constructions import absolute, bias, chords, counting, heads, kernels, newton, normalised, odometer, relative
from constructions.construction import Construction

#: Every construction by its name: what ``verify`` runs and ``build`` makes.
CONSTRUCTIONS: dict[str, Construction] = {
    **absolute.CONSTRUCTIONS,
    **chords.CONSTRUCTIONS,
    **newton.CONSTRUCTIONS,
    **counting.CONSTRUCTIONS,
    **odometer.CONSTRUCTIONS,
    **relative.CONSTRUCTIONS,
    **bias.CONSTRUCTIONS,
    **kernels.CONSTRUCTIONS,
    **heads.CONSTRUCTIONS,
    **normalised.CONSTRUCTIONS,
}

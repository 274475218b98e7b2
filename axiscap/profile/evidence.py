"""The held-out tests of an axis, as a profile's provenance records them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from axiscap.profile.checks import is_name_list, is_number, is_number_list, require

Predicate = Callable[[Any], bool]


@dataclass(frozen=True)
class Evidence:
    """How well an axis separates roles and questions that were held out when ``axiscap calibrate`` computed it.

    Parameters
    ----------
    best_layer
        where the axis separates best, among the later two thirds.
    held_roles
        the roles that were held out.
    held_questions
        how many questions were held out.
    auc
        by layer: the default's held-out answers against those of held-out roles.
    auc_interval
        95 %, at the best layer, over roles and answers.
    auc_by_kind
        by layer, of each kind of role.
    auc_by_role
        by layer, of each role.
    d_prime
        by layer, the difference of means over the root of the mean variance.
    null_auc
        by layer, the mean over axes that were computed with random labels.
    null_auc_interval
        of those axes, at the best layer.
    pc1_cosine
        by layer, of the role vectors' first principal component with the axis.
    variance
        shares of the first components at the best layer.
    components_70
        by layer, how many components hold 70 % of the variance.
    halves
        by layer, cosine of the axes from both halves of the questions.
    next_layer
        cosine of the axis with the next layer's, of each layer but the last.
    axis_interval
        95 %, of the cosine with axes from resampled roles, at the best layer.
    loadings
        each role's mean on the axis at the best layer, less the default's.
    map
        each role's coordinates on the first two components there.

    Examples
    --------
    >>> len(profile.evidence.auc) == profile.num_layers
    True
    """

    best_layer: int
    held_roles: list[str]
    held_questions: int
    auc: list[float]
    auc_interval: list[float]
    auc_by_kind: dict[str, list[float]]
    auc_by_role: dict[str, list[float]]
    d_prime: list[float]
    null_auc: list[float]
    null_auc_interval: list[float]
    pc1_cosine: list[float]
    variance: list[float]
    components_70: list[int]
    halves: list[float]
    next_layer: list[float]
    axis_interval: list[float]
    loadings: dict[str, float]
    map: dict[str, list[float]]

    @classmethod
    def read(cls, stored: object) -> Evidence:
        """Checks the evidence of a provenance, which anyone may have written.

        Parameters
        ----------
        stored
            the value of ``evidence``.

        Returns
        -------
        Evidence
            The same values.

        Raises
        ------
        ProfileError
            naming the entry that is missing or of another form.

        Examples
        --------
        >>> evidence = axiscap.Evidence.read(profile.provenance["evidence"])
        >>> evidence.best_layer == profile.evidence.best_layer
        True
        """
        require(isinstance(stored, Mapping), "its evidence must be an object")
        assert isinstance(stored, Mapping)
        auc = stored.get("auc")
        forms = _forms(len(auc) if isinstance(auc, list) else 0)
        for name, (is_valid, description) in forms.items():
            require(is_valid(stored.get(name)), f"its evidence cannot be read: {name} must be {description}")
        return cls(**{name: stored[name] for name in forms})


def _forms(num_layers: int) -> dict[str, tuple[Predicate, str]]:
    """The predicate that each entry must satisfy, and its description for a message."""

    def is_by_layer(value: Any) -> bool:
        return num_layers > 0 and is_number_list(value, num_layers)

    def is_pair(value: Any) -> bool:
        return is_number_list(value, 2)

    def is_mapping_of(is_valid: Predicate) -> Predicate:
        return lambda value: isinstance(value, Mapping) and len(value) > 0 and all(map(is_valid, value.values()))

    by_layer = is_by_layer, "a number for each layer"
    by_name_and_layer = is_mapping_of(is_by_layer), "a number for each layer, by name"
    pair = is_pair, "two numbers"
    return {
        "auc": by_layer,
        "best_layer": (lambda value: type(value) is int and 0 <= value < num_layers, "one of the layers of auc"),
        "held_roles": (is_name_list, "a list of names"),
        "held_questions": (lambda value: type(value) is int, "a number of questions"),
        "variance": (is_number_list, "a list of numbers"),
        "next_layer": (lambda value: is_number_list(value, num_layers - 1), "a number for each layer but the last"),
        "loadings": (is_mapping_of(is_number), "a number for each role"),
        "map": (is_mapping_of(is_pair), "two numbers for each role"),
        **dict.fromkeys(("d_prime", "null_auc", "pc1_cosine", "components_70", "halves"), by_layer),
        **dict.fromkeys(("auc_by_kind", "auc_by_role"), by_name_and_layer),
        **dict.fromkeys(("auc_interval", "null_auc_interval", "axis_interval"), pair),
    }

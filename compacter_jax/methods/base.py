"""What every method answers: which groups it trains, where it acts, how it is merged."""

from __future__ import annotations

import collections
import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from compacter_jax.messages import quote
from compacter_jax.methods.fields import did_you_mean, require, typed
from compacter_jax.paths import Groups
from compacter_jax.patterns import compiled
from compacter_jax.sites import Role, Site, check_output

if TYPE_CHECKING:
    from jax import Array

    from compacter_jax.hosts import Linear
    from compacter_jax.nn.dense import Dtype, ParamFunction

# The sites of a backbone where a part of a method acts, by name.
SitesOf = Callable[["InsertedConfig"], Mapping[str, Site]]


class SiteCall(Protocol):
    """One call of a host, as a method sees it.

    Attributes:
      args: what the host is called with.
      path: of the host, `/`-joined.
    """

    args: Any
    path: str

    @property
    def name(self) -> str:
        """The name of the site."""

    @property
    def site(self) -> Site:
        """The site."""

    @property
    def host(self) -> Any:
        """The module that is called."""

    @property
    def deterministic(self) -> bool:
        """Whether dropout is off."""

    @property
    def needs_plain(self) -> bool:
        """Whether some rows may be those of the backbone without an adapter."""

    def run(self, *args: Any) -> Any:
        """Runs the host, which a method that acts before it may have to do by itself."""

    def layer(
        self,
        cls: Callable[..., Any],
        like: Any,
        *args: Any,
        inputs: tuple[Any, ...],
        plain: Any,
        call_layer: Callable[..., Any] = ...,
        **kwargs: Any,
    ) -> Any:
        """Calls a layer of the method in the scope of the host.

        Args:
          cls: of the layer, `cls(*args, dtype=…, param_dtype=…)`.
          like: an array; the layer computes in its dtype.
          *args: what the layer is made with.
          inputs: arrays `[rows, …]` that the layer is called with.
          plain: what stands in place of the result in rows without an adapter, None for nothing.
          call_layer: `call_layer(layer, *inputs, **kwargs)`; by default the layer's `__call__`.
          **kwargs: what the layer is called with by name; arrays are `[rows, …]`.

        Raises:
          ValueError: if `like` is no array, or the host has something named as adapters are.
        """

    def hiding(self, count: int, key: Array, axis: int) -> tuple[Array, ...]:
        """Returns biases of attention that hide the first `count` keys in rows without adapter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The base of every method: what it trains beside what it inserts.

    Attributes:
      train_layer_norms: train the backbone's layer norms too. The paper does for every method
        (arXiv:2106.04647, section 5.1), AdapterHub does not.
      train_head: train the task's head. A pre-trained language-modelling head stays frozen.
      train_pooler: train the pooler of an encoder that has one.
    """

    kind: ClassVar[str] = ""
    # Of the fields that the class declares, where they are listed as flags.
    heading: ClassVar[str] = "in place of the preset's values, for any method"
    # Groups that the method trains whatever its fields say.
    own_groups: ClassVar[frozenset[str]] = frozenset({"adapters"})
    # Groups that a backbone may lack without that being a mistake.
    optional_groups: ClassVar[frozenset[str]] = frozenset({"head"})
    # The method trains all of the backbone, so that no head can be forgotten.
    trains_backbone: ClassVar[bool] = False
    # The method moves the backbone's parameters as a whole, see `moved`.
    moves_backbone: ClassVar[bool] = False

    train_layer_norms: bool = False
    train_head: bool = True
    train_pooler: bool = False

    def replace(self, **overrides: Any) -> Self:
        """Returns a copy with `overrides`.

        Raises:
          ValueError: for a field that the method does not have, or a value that cannot work.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in overrides:
            if name not in known:
                raise ValueError(
                    f"method {self.kind!r} has no field {quote(name, 100)}"
                    f"{did_you_mean(name, known)}; its fields are {', '.join(known)}"
                )
        return dataclasses.replace(self, **overrides)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            object.__setattr__(
                self, field.name, typed(field.name, getattr(self, field.name), hints[field.name])
            )

    def needs_token_ids(self) -> bool:
        """Returns whether the method starts from embeddings of tokens that are still to be named.

        They are the field `prompt_token_ids`, at most `extra_tokens` ids.
        """
        return False

    def inserted(self) -> tuple[InsertedConfig, ...]:
        """Returns what the method inserts: itself, its parts, those of all members, or nothing."""
        return ()

    def trained_inserted_groups(self) -> set[str]:
        """Returns the groups of what the method itself brings, as far as they are trained."""
        return set(self.own_groups)

    def trained_groups(self) -> set[str]:
        """Returns the groups of `GROUPS` that are trained whole; see `trains_biases` for others."""
        choices = {
            "layer norms": self.train_layer_norms,
            "head": self.train_head,
            "pooler": self.train_pooler,
        }
        chosen = {group for group, is_chosen in choices.items() if is_chosen}
        return self.trained_inserted_groups() | chosen

    def trains_biases(self) -> bool:
        """Returns whether the backbone's own biases are trained."""
        return any(part.trains_biases() for part in self.inserted())

    def unmergeable(self, sites_of: SitesOf) -> str | None:
        """Returns why weights of the backbone cannot express the method, None if they can.

        Args:
          sites_of: the sites of the backbone where a part acts.
        """
        del sites_of
        return None

    def without_adapters(self) -> MethodConfig:
        """Returns the method of a model whose backbone has the adapter merged into it."""
        return FullFineTuningConfig()

    def precomputed(
        self, params: Mapping[str, Any], sites_of: SitesOf
    ) -> tuple[MethodConfig, Mapping[str, Any]]:
        """Computes once what depends on parameters alone, for decoding.

        Args:
          params: of a model of the method.
          sites_of: the sites of the backbone where a part acts.

        Returns:
          A method that computes the same from the parameters returned; both as given if there is
          nothing to compute.
        """
        del sites_of
        return self, params

    def own_params(
        self, param: ParamFunction, paths: list[str], groups: Groups | None, dtype: Dtype
    ) -> dict[str, Any]:
        """Creates what a method that moves the backbone trains, at the top of the tree.

        Args:
          param: the model's `param` method.
          paths: `/`-joined, of all parameters of the model.
          groups: names of the head, norms and pooler, as in `Adapted`.
          dtype: of the parameters.
        """
        del param, paths, groups, dtype
        return {}

    def moved(self, params: Mapping[str, Any], groups: Groups | None) -> Any:
        """Returns the backbone's parameters as the method moves them, given those of the model."""
        del groups
        return params


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullFineTuningConfig(MethodConfig):
    """Full fine-tuning: every parameter of the backbone and its head; nothing is inserted."""

    kind: ClassVar[str] = "full"
    own_groups: ClassVar[frozenset[str]] = frozenset({"backbone"})
    optional_groups: ClassVar[frozenset[str]] = frozenset({"head", "pooler", "layer norms"})
    trains_backbone: ClassVar[bool] = True

    train_layer_norms: bool = True
    train_pooler: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class InsertedConfig(MethodConfig):
    """The base of every method that acts at sites of the backbone.

    Attributes:
      sites: where the method acts, names from the backbone's table of sites.
      leave_out: indices of layers in which it does not.
    """

    heading: ClassVar[str] = "for methods that act at sites"
    # Roles of sites where the method can act.
    roles: ClassVar[tuple[Role, ...]] = ()
    # The sites named by default are passed over in a backbone that does not have them.
    skips_missing_sites: ClassVar[bool] = False
    # Why a backbone needs none of the sites, for a message about `leave_out`; None if it needs one.
    needs_no_site: ClassVar[str | None] = None
    # Layers share parameters with those of the same site alone, see `shared`.
    shares_by_site: ClassVar[bool] = False
    # The layers add positions to attend to.
    adds_tokens: ClassVar[bool] = False
    # The update can be merged into kernels, see `merged`.
    moves_kernels: ClassVar[bool] = False
    # Every layer equals a dense one of the same class, see `dense_equivalent`.
    has_dense_equivalent: ClassVar[bool] = False

    sites: tuple[str, ...] = ()
    leave_out: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.all_sites():
            raise ValueError("sites is empty; name at least one, 'feed_forward' for example")
        for site, count in collections.Counter(self.all_sites()).items():
            if count > 1:
                raise ValueError(f"sites names {quote(site, 100)} twice; name each site once")
        for index in self.leave_out:
            require(index >= 0, "leave_out", index, "layer indices from 0 on")

    def inserted(self) -> tuple[InsertedConfig, ...]:
        """Returns the method itself."""
        return (self,)

    def trains_biases(self) -> bool:
        """Returns whether the backbone's own biases are trained."""
        return False

    def all_sites(self) -> tuple[str, ...]:
        """Returns every site the method acts at."""
        return self.sites

    def check_site(self, name: str, site: Site) -> None:
        """Checks that the method can act at a site, and in the way its fields say.

        Args:
          name: of the site.
          site: the site.

        Raises:
          ValueError: if it cannot.
        """
        if site.role not in self.roles:
            raise ValueError(
                f"method {self.kind!r} cannot act at site {name!r}, whose role is {site.role!r}; "
                f"it acts at sites of the roles {', '.join(self.roles)}"
            )
        check_output(name, site)
        in_layers = site.role not in ("embedding", "bias")
        if in_layers and "layer" not in compiled(site.host).groupindex:
            raise ValueError(
                f"the pattern {site.host!r} of site {name!r} has no group that is the "
                r"layer's index; write it as (?P<layer>\d+), or (?P<layer>\d+)? under nn.scan"
            )

    def is_before(self, site_name: str, site: Site) -> bool:
        """Returns whether the method acts on the host's arguments, not on its result."""
        del site_name
        return site.is_before

    def companions(self, site: Site) -> tuple[Site, ...]:
        """Returns the sites where the method acts too if it acts at `site`."""
        del site
        return ()

    def shared(
        self, param: ParamFunction, width: int | None, sites: list[str], dtype: Dtype
    ) -> dict[str, Any]:
        """Creates what the layers of the method share.

        Args:
          param: the `param` method of the module that owns it.
          width: of the backbone's hidden states, None if it does not say.
          sites: names of the sites where the method acts.
          dtype: of the parameters.

        Returns:
          Keyword arguments of a layer; where `shares_by_site`, a value of `hidden` for each site.
        """
        del param, width, sites, dtype
        return {}

    def act(self, call: SiteCall, x: Any, context: Any) -> Any:
        """Adapts what a host is called with or returns.

        Args:
          call: one call of a host.
          x: what is adapted; of the host's arguments if the method acts before it.
          context: what else is read: the residual, or the host's input.
        """
        raise NotImplementedError(type(self).__name__)

    def initial_values(
        self, backbone: Any, given: Mapping[str, Any], new: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Returns new leaves whose initial values depend on the backbone's parameters.

        Args:
          backbone: the module.
          given: its parameters, by `/`-joined path.
          new: freshly initialised adapters, likewise.
        """
        del backbone, given, new
        return {}

    def unmergeable(self, sites_of: SitesOf) -> str | None:
        """Returns why weights of the backbone cannot express the method, None if they can."""
        del sites_of
        return None if self.moves_kernels else "it adds more than weights"

    def merged(
        self, host: Mapping[str, Array], own: Mapping[str, Array], linear: Linear, path: str
    ) -> dict[str, Array]:
        """Returns the host's leaves that change when the method is merged into them.

        Args:
          host: the leaves of a linear layer.
          own: the adapter's parameters there.
          linear: the layout of its kernel.
          path: of the host, for messages.

        Raises:
          ValueError: if the kernel cannot hold the update.
        """
        raise NotImplementedError(type(self).__name__)

    @property
    def extra_tokens(self) -> int:
        """Number of input tokens for which the method makes room in front of a sequence."""
        return 0

    @property
    def allows_unadapted_rows(self) -> bool:
        """Whether rows of a batch can be without the adapter while others have it."""
        return True

    @property
    def replaces_residual(self) -> bool:
        """Whether the layer's result takes the place of the sub-layer's, residual included."""
        return False

    @property
    def rule(self) -> str | None:
        """Whose the rule of Kronecker products is, "shared" or "own"; None if there is none."""
        return None

    @property
    def owns_top_names(self) -> bool:
        """Whether the method's shared parameters have fixed names at the top of the tree."""
        return False

    def map_signature(self) -> Any:
        """Returns what members of an average of maps must agree in."""
        return self.kind

    def dense_equivalent(self) -> Any:
        """Returns the method whose dense layers compute the same, where there is one."""
        raise NotImplementedError(type(self).__name__)

    def dense_params(self, own: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the parameters of the dense layer that equals one of the method's.

        Args:
          own: the layer's parameters.
          shared: what it is called with that others share, see `shared`.
        """
        raise NotImplementedError(type(self).__name__)

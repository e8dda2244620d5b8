"""The interface of methods: the groups they train, the sites where they act, and their merging."""

from __future__ import annotations

import collections
import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from compacter_jax.messages import quote
from compacter_jax.methods.fields import did_you_mean, no_answer, require, typed
from compacter_jax.paths import Groups
from compacter_jax.patterns import compiled
from compacter_jax.sites import Role, Site, check_output

if TYPE_CHECKING:
    from jax import Array

    from compacter_jax.hosts import Linear
    from compacter_jax.nn.dense import Dtype, ParamFunction

# A function that returns the sites of a backbone where a part of a method acts, by name.
SitesOf = Callable[["InsertedConfig"], Mapping[str, Site]]


class SiteCall(Protocol):
    """One call of a host, as a method sees it.

    Attributes:
      args: positional arguments of the host.
      path: `/`-joined path of the host.
    """

    args: Any
    path: str

    @property
    def name(self) -> str:
        """Name of the site."""

    @property
    def site(self) -> Site:
        """The site."""

    @property
    def host(self) -> Any:
        """Module that is called."""

    @property
    def deterministic(self) -> bool:
        """True if dropout is off."""

    @property
    def needs_plain(self) -> bool:
        """True if some rows may need the result of the backbone without an adapter."""

    def run(self, *args: Any) -> Any:
        """Runs the host; a method that acts before the host may have to do this itself."""

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
          cls: constructor of the layer, `cls(*args, dtype=…, param_dtype=…)`.
          like: array whose dtype the layer computes in.
          *args: arguments of the constructor.
          inputs: positional arguments of the layer, arrays `[rows, …]`.
          plain: value of the result in rows without an adapter; None if there is none.
          call_layer: `call_layer(layer, *inputs, **kwargs)`; by default the layer's `__call__`.
          **kwargs: keyword arguments of the layer; arrays are `[rows, …]`.

        Raises:
          ValueError: if `like` is not an array, or the host already has the name of the adapters.
        """

    def again(
        self, site: str, call_layer: Callable[..., Any], *, inputs: tuple[Any, ...], plain: Any
    ) -> Any:
        """Calls the layer that the part made at another site, outside of the layers, as `layer`."""

    def hiding(self, count: int, key: Array, axis: int) -> tuple[Array, ...]:
        """Returns biases of attention that hide the first `count` keys in rows without adapter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The base of every method: the parameters that it trains beside those that it inserts.

    Attributes:
      train_layer_norms: True to train the backbone's layer norms too. The Compacter paper does so
        for every method (arXiv:2106.04647, section 5.1); AdapterHub does not.
      train_head: True to train the task's head. A pre-trained language-modelling head stays frozen.
      train_pooler: True to train the pooler of an encoder that has one.
    """

    kind: ClassVar[str] = ""
    # Heading of the class's own fields in a list of flags.
    heading: ClassVar[str] = "in place of the preset's values, for any method"
    # Groups that the method trains, independently of its fields.
    own_groups: ClassVar[frozenset[str]] = frozenset({"adapters"})
    # Groups that a backbone may lack without an error.
    optional_groups: ClassVar[frozenset[str]] = frozenset({"head"})
    # True if the method trains the whole backbone, so that no head can be forgotten.
    trains_backbone: ClassVar[bool] = False
    # True if the method moves the backbone's parameters as a whole, see `moved`.
    moves_backbone: ClassVar[bool] = False

    train_layer_norms: bool = False
    train_head: bool = True
    train_pooler: bool = False

    def replace(self, **overrides: Any) -> Self:
        """Returns a copy with `overrides`.

        Raises:
          ValueError: for a field that the method does not have, or an invalid value.
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

    def replaceable(self) -> set[str]:
        """Returns the names of the fields that `replace` accepts."""
        return {field.name for field in dataclasses.fields(self)}

    def needs_token_ids(self) -> bool:
        """Returns True if the prompt starts from embeddings of tokens that are not named yet.

        These tokens are the field `prompt_token_ids`, at most `extra_tokens` ids.
        """
        return False

    def inserted(self) -> tuple[InsertedConfig, ...]:
        """Returns the inserted methods: itself, its parts, those of all members, or none."""
        return ()

    def trained_inserted_groups(self) -> set[str]:
        """Returns the groups of the method's own parameters that are trained."""
        return set(self.own_groups)

    def trained_groups(self) -> set[str]:
        """Returns the groups of `GROUPS` that are trained whole; `trains_biases` adds to them."""
        choices = {
            "layer norms": self.train_layer_norms,
            "head": self.train_head,
            "pooler": self.train_pooler,
        }
        return self.trained_inserted_groups() | {group for group in choices if choices[group]}

    def trains_biases(self) -> bool:
        """Returns True if the method trains the backbone's own biases."""
        return any(part.trains_biases() for part in self.inserted())

    def unmergeable(self, sites_of: SitesOf) -> str | None:
        """Returns why weights of the backbone cannot express the method, or None if they can.

        Args:
          sites_of: function that returns the sites of the backbone where a part acts.
        """
        del sites_of
        return None

    def without_adapters(self) -> MethodConfig:
        """Returns the method of a model after its adapter was merged into the backbone."""
        return FullFineTuningConfig()

    def precomputed(
        self, params: Mapping[str, Any], sites_of: SitesOf
    ) -> tuple[MethodConfig, Mapping[str, Any]]:
        """Computes values that depend on the parameters alone once, for decoding.

        Args:
          params: parameters of a model of the method.
          sites_of: function that returns the sites of the backbone where a part acts.

        Returns:
          A method and parameters that compute the same result; the arguments themselves if there is
          nothing to compute.
        """
        del sites_of
        return self, params

    def own_params(
        self, param: ParamFunction, paths: list[str], groups: Groups | None, dtype: Dtype
    ) -> dict[str, Any]:
        """Creates the trained parameters of a method that moves the backbone, at the tree's top.

        Args:
          param: the model's `param` method.
          paths: `/`-joined paths of all parameters of the model.
          groups: names of the head, norms and pooler, as in `Adapted`.
          dtype: dtype of the parameters.
        """
        del param, paths, groups, dtype
        return {}

    def moved(self, params: Mapping[str, Any], groups: Groups | None) -> Any:
        """Returns the parameters of the backbone after the method has moved them."""
        del groups
        return params


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullFineTuningConfig(MethodConfig):
    """Full fine-tuning of every parameter of the backbone and its head, with nothing inserted."""

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
      sites: names of sites where the method acts, from the backbone's table of sites.
      leave_out: indices of layers in which the method does not act.
    """

    heading: ClassVar[str] = "for methods that act at sites"
    # Roles of the sites where the method can act.
    roles: ClassVar[tuple[Role, ...]] = ()
    # True if the default sites are skipped in a backbone that lacks them.
    skips_missing_sites: ClassVar[bool] = False
    # Why a backbone may have none of the sites, for a message about `leave_out`; None if it must
    # have one.
    needs_no_site: ClassVar[str | None] = None
    # True if layers share parameters only with layers of the same site, see `shared`.
    shares_by_site: ClassVar[bool] = False
    # True if the layers add positions to attend to.
    adds_tokens: ClassVar[bool] = False
    # True if the update can be merged into kernels, see `merged`.
    moves_kernels: ClassVar[bool] = False
    # True if every layer equals a dense layer of the same class, see `dense_equivalent`.
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
        """Returns True if the method trains the backbone's own biases."""
        return False

    def all_sites(self) -> tuple[str, ...]:
        """Returns every site where the method acts."""
        return self.sites

    def optional_sites(self) -> tuple[str, ...]:
        """Returns the sites that are skipped in a backbone that lacks them."""
        return type(self)().sites if self.skips_missing_sites else ()

    def check_site(self, name: str, site: Site) -> None:
        """Checks that the method can act at a site, with the values of its fields.

        Args:
          name: name of the site.
          site: the site.

        Raises:
          ValueError: if the method cannot act there.
        """
        if site.role not in self.roles:
            raise ValueError(
                f"method {self.kind!r} cannot act at site {name!r}, whose role is {site.role!r}; "
                f"it acts at sites of the roles {', '.join(self.roles)}"
            )
        check_output(name, site)
        in_layers = site.role not in ("embedding", "embedded", "vocabulary", "bias")
        if in_layers and "layer" not in compiled(site.host).groupindex:
            raise ValueError(
                f"the pattern {site.host!r} of site {name!r} has no group for the layer index; "
                r"write it as (?P<layer>\d+), or (?P<layer>\d+)? under nn.scan"
            )

    def is_before(self, site_name: str, site: Site) -> bool:
        """Returns True if the method acts on the host's arguments instead of its result."""
        del site_name
        return site.is_before

    def companions(self, site: Site) -> tuple[Site, ...]:
        """Returns the further sites where the method acts if it acts at `site`."""
        del site
        return ()

    def shared(
        self, param: ParamFunction, width: int | None, sites: list[str], dtype: Dtype
    ) -> dict[str, Any]:
        """Creates the parameters that the layers of the method share.

        Args:
          param: the `param` method of the module that owns them.
          width: width of the backbone's hidden states, None if the backbone does not say.
          sites: names of the sites where the method acts.
          dtype: dtype of the parameters.

        Returns:
          Keyword arguments of a layer; with `shares_by_site`, a value of `hidden` for each site.
        """
        del param, width, sites, dtype
        return {}

    def act(self, call: SiteCall, x: Any, context: Any) -> Any:
        """Adapts the arguments or the result of a host.

        Args:
          call: one call of the host.
          x: adapted value; from the host's arguments if the method acts before the host.
          context: further value that the method reads: the residual, or the host's input.
        """
        raise no_answer(self, "act", "every inserted method needs")

    def initial_values(
        self, backbone: Any, given: Mapping[str, Any], new: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Returns new leaves whose initial values depend on the backbone's parameters.

        Args:
          backbone: module of the backbone.
          given: parameters of the backbone, by `/`-joined path.
          new: freshly initialised adapters, by `/`-joined path.
        """
        del backbone, given, new
        return {}

    def unmergeable(self, sites_of: SitesOf) -> str | None:
        """Returns why weights of the backbone cannot express the method, or None if they can."""
        del sites_of
        return None if self.moves_kernels else "it adds more than weights"

    def slow_start(self, width: int | None, reach: float) -> str | None:
        """Returns why a run is too short for the initial values, None if it is not.

        Args:
          width: of the backbone's hidden states, None if it does not say.
          reach: sum of the learning rates, which is how far Adam moves a parameter.
        """
        del width, reach
        return None

    def merged(
        self, host: Mapping[str, Array], own: Mapping[str, Array], linear: Linear, path: str
    ) -> dict[str, Array]:
        """Returns the host's leaves that change when the method is merged into them.

        Args:
          host: leaves of a linear layer.
          own: parameters of its adapter.
          linear: layout of its kernel.
          path: path of the host, for messages.

        Raises:
          ValueError: if the kernel cannot hold the update.
        """
        raise no_answer(self, "merged", "methods with moves_kernels need")

    @property
    def joins_networks(self) -> bool:
        """True if merging makes the adapters a part of the feed-forward networks beside them."""
        return False

    def network_units(self, width: int) -> int:
        """Returns the number of units that an adapter adds to a network of `width` outputs."""
        raise no_answer(self, "network_units", "methods with joins_networks need")

    def network(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Returns dense `down` and `up` that equal the adapter of parameters `own`."""
        raise no_answer(self, "network", "methods with joins_networks need")

    @property
    def extra_tokens(self) -> int:
        """Number of input tokens that the method reserves in front of a sequence."""
        return 0

    @property
    def allows_unadapted_rows(self) -> bool:
        """True if some rows of a batch can be without the adapter while others have it."""
        return True

    @property
    def replaces_residual(self) -> bool:
        """True if the layer's result replaces the sub-layer's result, residual included."""
        return False

    @property
    def rule(self) -> str | None:
        """Owner of the rule of Kronecker products, "shared" or "own"; None if there is no rule."""
        return None

    @property
    def sharing(self) -> Any:
        """Value that parts need in common to share parameters with fixed names, None without."""
        return None

    def map_signature(self) -> Any:
        """Returns the value in which all members of an average of maps must agree."""
        return self.kind

    def dense_equivalent(self) -> Any:
        """Returns the method whose dense layers compute the same, if there is one."""
        raise no_answer(self, "dense_equivalent", "methods with has_dense_equivalent need")

    def dense_params(self, own: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the parameters of the dense layer that equals one of the method's.

        Args:
          own: parameters of the layer.
          shared: keyword arguments of the layer that other layers share, see `shared`.
        """
        raise no_answer(self, "dense_params", "methods with has_dense_equivalent need")

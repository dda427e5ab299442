"""The options of a training run, which Python and the `mor` command share."""

from mor_cli.options import RoutingOptions, RunOptions, parse_capacities

__all__ = ["RoutingOptions", "RunOptions", "parse_capacities"]

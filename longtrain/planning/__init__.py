"""What a run will need and how long its steps will take, before it starts: `longtrain plan`."""

from longtrain.planning.devices import Devices, devices_named
from longtrain.planning.planner import Plan, plan
from longtrain.planning.search import longest, search

__all__ = ["Devices", "Plan", "devices_named", "longest", "plan", "search"]

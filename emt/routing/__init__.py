"""Routing: which passages of a memory a prompt is about, told by a few of the model's heads."""

from emt.routing.profile import HeadProfile as HeadProfile
from emt.routing.profile import ProfiledHead as ProfiledHead
from emt.routing.router import Routed as Routed
from emt.routing.router import RoutedPassage as RoutedPassage
from emt.routing.router import Router as Router

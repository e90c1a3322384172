"""What is done once a command: refuse a bad config, check all runs of a sweep, tell how they ended."""

from __future__ import annotations

import json
import logging
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from allostasis.core.compose import composition_problems
from allostasis.core.config import config_hash
from allostasis.core.validate import Problem, check

log = logging.getLogger(__name__)
traceback_log = logging.getLogger("allostasis.traceback")  # run.log only, see conf/config.yaml

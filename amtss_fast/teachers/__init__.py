"""Teachers of one student: loading them, asking them about a batch, caching their logits, 8-bit weights."""
# The guard stands before the imports that it guards.
# ruff: noqa: E402

from amtss_fast._compat.extras import need_training_extra

need_training_extra(__name__)

from amtss_fast.teachers.cache import FORMATS, CachedLogits, CacheEntry, default_format, files_digest
from amtss_fast.teachers.cached import ROW, CachedTeachers, pool_logits
from amtss_fast.teachers.contract import Answers, Teachers
from amtss_fast.teachers.load import PRECISIONS, TASK_MODELS, load_teacher
from amtss_fast.teachers.pool import LiveTeachers, TeacherPool
from amtss_fast.teachers.residence import Residence
from amtss_fast.teachers.teacher import Teacher
from amtss_fast.teachers.tokens import TokenTeachers

__all__ = [
    "FORMATS",
    "PRECISIONS",
    "ROW",
    "TASK_MODELS",
    "Answers",
    "CacheEntry",
    "CachedLogits",
    "CachedTeachers",
    "LiveTeachers",
    "Residence",
    "Teacher",
    "TeacherPool",
    "Teachers",
    "TokenTeachers",
    "default_format",
    "files_digest",
    "load_teacher",
    "pool_logits",
]

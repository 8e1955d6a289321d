"""A teacher's outputs on the disk, made once, read by row id: top-k lists of a language model, features of a vision model."""

from kdfast.data.teacher_cache.features import FeatureCache, cache_features
from kdfast.data.teacher_cache.language import Estimate, cache_teacher
from kdfast.data.teacher_cache.reader import TeacherCache
from kdfast.data.teacher_cache.store import CacheError

__all__ = ["CacheError", "Estimate", "FeatureCache", "TeacherCache", "cache_features", "cache_teacher"]

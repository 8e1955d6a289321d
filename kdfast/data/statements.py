"""Statements of a hyper-relational graph as token sequences: [head, relation, MASK, qualifier relation, qualifier entity, ..., PAD].

Tokens: the special ones below, then the entities, the relations, and the relations once more, reversed.
"""

PAD, MASK, SEP, CLS, NO_RELATION, NO_QUALIFIER_RELATION, NO_QUALIFIER_ENTITY = range(7)
SPECIALS = 7

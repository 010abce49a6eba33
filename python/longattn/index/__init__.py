"""Indexes over a `KVStore`'s rows: each picks the rows that are worth reading, and grows with the store."""

from longattn.index._index import Index
from longattn.index.by_name import KINDS, make
from longattn.index.clusters import Clusters
from longattn.index.collisions import Collisions
from longattn.index.features import Features
from longattn.index.flat import Flat
from longattn.index.graph import Graph
from longattn.index.hashes import Hashes, random_weights
from longattn.index.inverted_lists import InvertedLists
from longattn.index.lsh_tables import LshTables
from longattn.index.pages import Pages
from longattn.index.product_quantisation import ProductQuantisation
from longattn.index.signatures import Signatures
from longattn.index.train_hash_weights import train_hash_weights

__all__ = [
    "KINDS",
    "Clusters",
    "Collisions",
    "Features",
    "Flat",
    "Graph",
    "Hashes",
    "Index",
    "InvertedLists",
    "LshTables",
    "Pages",
    "ProductQuantisation",
    "Signatures",
    "make",
    "random_weights",
    "train_hash_weights",
]

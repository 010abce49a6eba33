"""Indexes over a `KVStore`'s rows: each picks the rows that are worth reading, and grows with the store."""

from longattn.index._index import Index
from longattn.index.by_name import KINDS, make
from longattn.index.clusters import Clusters
from longattn.index.features import Features
from longattn.index.flat import Flat
from longattn.index.graph import Graph
from longattn.index.inverted_lists import InvertedLists
from longattn.index.pages import Pages
from longattn.index.product_quantisation import ProductQuantisation
from longattn.index.signatures import Signatures

__all__ = [
    "KINDS",
    "Clusters",
    "Features",
    "Flat",
    "Graph",
    "Index",
    "InvertedLists",
    "Pages",
    "ProductQuantisation",
    "Signatures",
    "make",
]

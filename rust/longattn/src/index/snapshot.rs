//! Indexes in files.
//!
//! A safetensors file as the store's snapshots are (`kv/snapshot.rs`): the length of the header, a JSON header padded with spaces, the
//! tensors. The header's `__metadata__` holds the kind of index, its parameters as JSON, the rows it covers, a checksum of those rows of
//! the store, and one of the file itself, taken with zeros in its own place. An index is loaded onto a store that has the very rows it
//! was made of, as its first ones, or not at all.

use super::{
    Collisions, Features, Flat, Graph, Hashes, Index, InvertedLists, KeyClusters, LshTables, Pages,
    ProductQuantisation, Signatures,
};
use crate::kv::snapshot::{NO_CHECKSUM, Refusal, corrupt, open_checked, replace_file};
use crate::kv::{KvStore, Reader};
use crate::tensor::{Error, Result};
use serde_json::{Map, Value};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;
use xxhash_rust::xxh3::Xxh3;

const FORMAT: &str = "longattn.index";
const VERSION: &str = "3";

/// What an index was made with, by name.
pub type Parameters = Map<String, Value>;

/// An index as data: what it was made with, and what it holds.
#[derive(Clone, Debug)]
pub struct Saved {
    /// Rows of the store that it covers.
    pub rows: usize,
    /// What it was made with, and other numbers.
    pub parameters: Parameters,
    /// What it holds.
    pub tensors: Vec<SavedTensor>,
}

/// A named array.
#[derive(Clone, Debug)]
pub struct SavedTensor {
    /// Its name, unique in the index.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its elements.
    pub data: SavedData,
}

/// Elements of an array.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "named after what they hold")]
pub enum SavedData {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    U32(Vec<u32>),
    U64(Vec<u64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
}

macro_rules! each_type {
    ($macro:ident) => {
        $macro!(U8 u8 "U8", I8 i8 "I8", U16 u16 "U16", U32 u32 "U32", U64 u64 "U64", F32 f32 "F32", F64 f64 "F64");
    };
}

macro_rules! data_methods {
    ($($variant:ident $type:ident $name:literal),*) => {
        impl SavedData {
            fn dtype(&self) -> &'static str {
                match self { $(Self::$variant(_) => $name),* }
            }

            /// Elements.
            pub fn len(&self) -> usize {
                match self { $(Self::$variant(x) => x.len()),* }
            }

            /// Whether there is none.
            pub fn is_empty(&self) -> bool {
                self.len() == 0
            }

            fn to_bytes(&self) -> Vec<u8> {
                match self { $(Self::$variant(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect()),* }
            }

            fn from_bytes(dtype: &str, bytes: &[u8]) -> Option<Self> {
                match dtype {
                    $($name => {
                        let (elements, rest) = bytes.as_chunks::<{ size_of::<$type>() }>();
                        rest.is_empty().then(|| Self::$variant(elements.iter().map(|b| <$type>::from_le_bytes(*b)).collect()))
                    })*
                    _ => None,
                }
            }
        }

        /// A type that tensors of an index may have.
        pub trait SavedElement: Sized {
            /// The elements, if they are of this type.
            fn of(data: SavedData) -> Option<Vec<Self>>;
        }

        $(
            impl SavedElement for $type {
                fn of(data: SavedData) -> Option<Vec<Self>> {
                    match data {
                        SavedData::$variant(x) => Some(x),
                        _ => None,
                    }
                }
            }

            impl From<Vec<$type>> for SavedData {
                fn from(x: Vec<$type>) -> Self {
                    Self::$variant(x)
                }
            }
        )*
    };
}
each_type!(data_methods);

impl Saved {
    /// An index of `rows` rows that was made with `parameters`.
    pub fn new(rows: usize, parameters: Parameters) -> Self {
        Self { rows, parameters, tensors: Vec::new() }
    }

    /// With one more number.
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.parameters.insert(name.into(), value.into());
        self
    }

    /// With a tensor of one axis or, by its length, of several.
    pub fn tensor(mut self, name: impl Into<String>, shape: &[usize], data: impl Into<SavedData>) -> Self {
        let data = data.into();
        assert!(shape.iter().product::<usize>() == data.len(), "the shape of a saved tensor");
        self.tensors.push(SavedTensor { name: name.into(), shape: shape.to_vec(), data });
        self
    }

    /// A parameter that is a whole number of 0 or more.
    pub fn integer(&self, name: &str) -> Result<u64> {
        self.parameters.get(name).and_then(Value::as_u64).ok_or_else(|| lacks(name, "a whole number"))
    }

    /// A parameter that is a number.
    pub fn number(&self, name: &str) -> Result<f64> {
        self.parameters.get(name).and_then(Value::as_f64).ok_or_else(|| lacks(name, "a number"))
    }

    /// A parameter that is true or false.
    pub fn flag(&self, name: &str) -> Result<bool> {
        self.parameters.get(name).and_then(Value::as_bool).ok_or_else(|| lacks(name, "true or false"))
    }

    /// A parameter that is a text.
    pub fn text(&self, name: &str) -> Result<&str> {
        self.parameters.get(name).and_then(Value::as_str).ok_or_else(|| lacks(name, "a text"))
    }

    /// Takes a tensor out: its elements, which are as many as `shape` says.
    pub fn take<T: SavedElement>(&mut self, name: &str, shape: &[usize]) -> Result<Vec<T>> {
        let Some(at) = self.tensors.iter().position(|t| t.name == name) else {
            return Err(lacks(name, "a tensor"));
        };
        let tensor = self.tensors.swap_remove(at);
        if tensor.shape != shape {
            return Err(lacks(name, &format!("a tensor of shape {shape:?}, not {:?}", tensor.shape)));
        }
        T::of(tensor.data).ok_or_else(|| lacks(name, "a tensor of another dtype"))
    }

    /// As [`Self::take`], of one axis whose length is not known.
    pub fn take_list<T: SavedElement>(&mut self, name: &str) -> Result<Vec<T>> {
        let len = self.tensors.iter().find(|t| t.name == name).map_or(0, |t| t.data.len());
        self.take(name, &[len])
    }

    fn header(&self, kind: &str, store: &str, checksum: &str) -> Vec<u8> {
        let mut metadata = Map::new();
        for (name, value) in [
            ("format", FORMAT.to_owned()),
            ("version", VERSION.to_owned()),
            ("kind", kind.to_owned()),
            ("rows", self.rows.to_string()),
            ("parameters", Value::Object(self.parameters.clone()).to_string()),
            ("store", store.to_owned()),
            ("xxh3", checksum.to_owned()),
        ] {
            metadata.insert(name.into(), value.into());
        }
        let mut header = Map::new();
        header.insert("__metadata__".into(), metadata.into());
        let mut at = 0;
        for tensor in &self.tensors {
            let end = at + tensor.data.to_bytes_len();
            let entry =
                serde_json::json!({"dtype": tensor.data.dtype(), "shape": tensor.shape, "data_offsets": [at, end]});
            header.insert(tensor.name.clone(), entry);
            at = end;
        }
        let mut json = Value::Object(header).to_string();
        json.extend(std::iter::repeat_n(' ', json.len().next_multiple_of(8) - json.len()));
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes
    }
}

impl SavedData {
    fn to_bytes_len(&self) -> usize {
        let size = match self {
            Self::U8(_) | Self::I8(_) => 1,
            Self::U16(_) => 2,
            Self::U32(_) | Self::F32(_) => 4,
            Self::U64(_) | Self::F64(_) => 8,
        };
        size * self.len()
    }
}

fn lacks(name: &str, expected: &str) -> Error {
    Error::value("path", format!("an index file without its {name:?}"), expected)
}

/// Checksum of the first `rows` rows of a store: keys and values, as they lie in memory.
fn digest(reader: &Reader, rows: usize) -> String {
    let mut hash = Xxh3::new();
    for bytes in reader.heads() {
        let row = bytes.len() / reader.len().max(1);
        hash.update(&bytes[..rows * row]);
    }
    format!("{:016x}", hash.digest())
}

/// Writes an index to a file, which appears under `path` complete or not at all.
pub fn save(index: &dyn Index, path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    let reader = index.store().read();
    let saved = index.save();
    if saved.rows > reader.len() {
        // A truncate came between: the index has not followed it yet.
        return Err(Error::value(
            "index",
            format!("{} rows", saved.rows),
            format!("the store's {}: update it first", reader.len()),
        ));
    }
    let store = digest(&reader, saved.rows);
    drop(reader);
    replace_file(path, |file| {
        let unsigned = saved.header(index.kind(), &store, NO_CHECKSUM);
        let mut hash = Xxh3::new();
        hash.update(&unsigned);
        file.write_all(&unsigned)?;
        for tensor in &saved.tensors {
            let bytes = tensor.data.to_bytes();
            hash.update(&bytes);
            file.write_all(&bytes)?;
        }
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&saved.header(index.kind(), &store, &format!("{:016x}", hash.digest())))?;
        file.sync_all()
    })
}

/// Reads an index that [`save`] wrote, onto a store whose first rows are those it was made of.
pub fn load(path: impl AsRef<Path>, store: Arc<KvStore>) -> Result<Arc<dyn Index>> {
    let path = path.as_ref();
    let (kind, saved, digest_then) = read(path).map_err(|refusal| refusal.about(path))?;
    let name = path.display();
    let reader = store.read();
    if saved.rows > reader.len() || digest(&reader, saved.rows) != digest_then {
        let got = format!("{name}, an index of {} rows", saved.rows);
        return Err(Error::value("path", got, "an index of this store's first rows"));
    }
    drop(reader);
    let index: Arc<dyn Index> = match kind.as_str() {
        "features" => Arc::new(Features::load(store, saved)?),
        "flat" => Arc::new(Flat::load(store, saved)?),
        "graph" => Arc::new(Graph::load(store, saved)?),
        "inverted_lists" => Arc::new(InvertedLists::load(store, saved)?),
        "clusters" => Arc::new(KeyClusters::load(store, saved)?),
        "pages" => Arc::new(Pages::load(store, saved)?),
        "product_quantisation" => Arc::new(ProductQuantisation::load(store, saved)?),
        "collisions" => Arc::new(Collisions::load(store, saved)?),
        "hashes" => Arc::new(Hashes::load(store, saved)?),
        "lsh" => Arc::new(LshTables::load(store, saved)?),
        "signatures" => Arc::new(Signatures::load(store, saved)?),
        _ => return Err(Error::value("path", format!("an index of kind {kind:?}"), "a kind that this version has")),
    };
    Ok(index)
}

fn read(path: &Path) -> std::result::Result<(String, Saved, String), Refusal> {
    let (mut file, head, file_bytes) = open_checked(path, FORMAT)?;
    let header: Value = match serde_json::from_slice(&head[8..]) {
        Ok(value) => value,
        Err(error) => return corrupt(format!("its header is not JSON: {error}")),
    };
    let metadata = &header["__metadata__"];
    let text = |name: &str| metadata[name].as_str().unwrap_or_default().to_owned();
    if text("format") != FORMAT {
        return corrupt(format!("not a {FORMAT} file: it says {:?}", text("format")));
    }
    if text("version") != VERSION {
        let got = text("version");
        return corrupt(format!("an index of version {got:?}, expected {VERSION:?}: make it anew from its store"));
    }
    let (Ok(rows), Ok(Value::Object(parameters))) = (text("rows").parse(), serde_json::from_str(&text("parameters")))
    else {
        return corrupt("its rows or parameters cannot be read");
    };
    let mut table: Vec<(&String, &Value, [u64; 2])> = Vec::new();
    for (name, entry) in header.as_object().into_iter().flatten().filter(|(name, _)| *name != "__metadata__") {
        let (Some(start), Some(end)) = (entry["data_offsets"][0].as_u64(), entry["data_offsets"][1].as_u64()) else {
            return corrupt(format!("its tensor {name:?} is {entry}"));
        };
        table.push((name, entry, [start, end]));
    }
    table.sort_by_key(|(_, _, offsets)| *offsets);
    let mut saved = Saved { rows, parameters, tensors: Vec::new() };
    let mut hash = Xxh3::new();
    let mut data = Vec::new();
    let mut at = 0;
    for (name, entry, [start, end]) in table {
        if start != at || end < start || end > file_bytes - head.len() as u64 {
            return corrupt(format!("cut off, or its tensor {name:?} is {entry}"));
        }
        let mut bytes = vec![0; (end - start) as usize];
        file.read_exact(&mut bytes)?;
        let dtype = entry["dtype"].as_str().unwrap_or_default();
        let shape: Option<Vec<usize>> =
            entry["shape"].as_array().map(|n| n.iter().filter_map(|n| usize::try_from(n.as_u64()?).ok()).collect());
        match (SavedData::from_bytes(dtype, &bytes), shape) {
            (Some(values), Some(shape))
                if shape.iter().try_fold(1usize, |a, &n| a.checked_mul(n)) == Some(values.len()) =>
            {
                saved.tensors.push(SavedTensor { name: name.clone(), shape, data: values });
            }
            _ => return corrupt(format!("its tensor {name:?} is {entry}")),
        }
        data.push(bytes);
        at = end;
    }
    if at + head.len() as u64 != file_bytes {
        return corrupt(format!("too long: {file_bytes} bytes, while its header says {}", at + head.len() as u64));
    }
    let (kind, store, checksum) = (text("kind"), text("store"), text("xxh3"));
    if head != saved.header(&kind, &store, &checksum) {
        return corrupt("altered: the header is not as it was written");
    }
    hash.update(&saved.header(&kind, &store, NO_CHECKSUM));
    data.iter().for_each(|bytes| hash.update(bytes));
    let found = format!("{:016x}", hash.digest());
    if found != checksum {
        return corrupt(format!("altered: its checksum is {found}, while its header says {checksum}"));
    }
    Ok((kind, saved, store))
}

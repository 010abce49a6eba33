//! Stores in files.
//!
//! A snapshot is a safetensors file: the length of the header (8 bytes, little-endian), a JSON header padded with spaces, then the
//! rows of `keys`, `[kv_heads, len, head_dim]`, and `values`, `[kv_heads, len, value_dim]`. The header's `__metadata__` holds the
//! capacity and an XXH3 checksum of the whole file, taken with zeros in the checksum's own place. A file that is cut off, altered
//! anywhere, or of another kind is refused.

use super::KvStore;
use crate::tensor::{DType, Error, Result};
use serde_json::Value;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use xxhash_rust::xxh3::Xxh3;

#[cfg(not(target_endian = "little"))]
compile_error!("longattn::kv writes rows as they lie in memory, and snapshots are little-endian");

const FORMAT: &str = "longattn.kvstore";
const VERSION: &str = "1";
/// Ours have a few hundred bytes; a claim of more than this is not followed.
const MAX_HEADER: u64 = 1 << 16;
/// Bytes hashed and read or written at a time, so that the second pass finds them in the cache.
const BLOCK: usize = 1 << 18;
const NO_CHECKSUM: &str = "0000000000000000";

impl KvStore {
    /// Writes the rows stored now to a file, which appears under `path` complete or not at all. Appends may go on meanwhile.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let io_error = |source| Error::Io { path: path.display().to_string(), source };
        let (file, temporary) = create_beside(path).map_err(io_error)?;
        let done = self.write_to(file).and_then(|()| fs::rename(&temporary, path));
        if let Err(error) = done {
            // The first error is the one to report; a file left behind changes nothing.
            let _ = fs::remove_file(&temporary);
            return Err(io_error(error));
        }
        // The name is durable only once the folder is.
        File::open(folder_of(path)).and_then(|folder| folder.sync_all()).map_err(io_error)
    }

    fn write_to(&self, mut file: File) -> io::Result<()> {
        let reader = self.read();
        let header = Header {
            kv_heads: self.kv_heads(),
            len: reader.len(),
            head_dim: self.head_dim(),
            value_dim: self.value_dim(),
            dtype: self.dtype(),
            capacity: self.capacity(),
        };
        let mut hash = Xxh3::new();
        let unsigned = header.render(NO_CHECKSUM);
        hash.update(&unsigned);
        file.write_all(&unsigned)?;
        for block in reader.heads().flat_map(|rows| rows.chunks(BLOCK)) {
            hash.update(block);
            file.write_all(block)?;
        }
        drop(reader);
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&header.render(&format!("{:016x}", hash.digest())))?;
        file.sync_all()
    }

    /// Reads a store from a file that [`save`](Self::save) wrote. It has the capacity of the saved one, or the given capacity.
    pub fn load(path: impl AsRef<Path>, capacity: Option<usize>) -> Result<Self> {
        let path = path.as_ref();
        let name = || path.display().to_string();
        read_store(path, capacity).map_err(|refusal| match refusal {
            Refusal::Corrupt(reason) => Error::Corrupt { path: name(), reason },
            Refusal::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Error::Corrupt { path: name(), reason: "cut off while it was read".into() }
            }
            Refusal::Io(source) => Error::Io { path: name(), source },
            Refusal::Other(error) => error,
        })
    }
}

/// A new file in the folder of `path`, under a name that nobody else uses.
fn create_beside(path: &Path) -> io::Result<(File, PathBuf)> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    if path.file_name().is_none() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not the name of a file"));
    }
    loop {
        let name = format!(".longattn-{}-{}.tmp", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let temporary = folder_of(path).join(name);
        match OpenOptions::new().write(true).create_new(true).open(&temporary) {
            // Left by a process that died and had our number.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            opened => return opened.map(|file| (file, temporary)),
        }
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Why a file is not loaded, before the path is put to it.
enum Refusal {
    Corrupt(String),
    Io(io::Error),
    Other(Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

fn corrupt<T>(reason: impl Into<String>) -> std::result::Result<T, Refusal> {
    Err(Refusal::Corrupt(reason.into()))
}

fn read_store(path: &Path, capacity: Option<usize>) -> std::result::Result<KvStore, Refusal> {
    // Asked before it is opened, since opening a pipe waits for its other end.
    if !fs::metadata(path)?.is_file() {
        return corrupt("not a regular file");
    }
    let mut file = File::open(path)?;
    let file_bytes = file.metadata()?.len();
    if file_bytes < 8 {
        return corrupt(format!("cut off: {file_bytes} bytes, shorter than the length of a header"));
    }
    let mut head = vec![0u8; 8];
    file.read_exact(&mut head)?;
    let claimed = u64::from_le_bytes(head[..8].try_into().expect("8 bytes"));
    if claimed > MAX_HEADER || claimed > file_bytes - 8 {
        return corrupt(format!(
            "cut off, or not a {FORMAT} file: a header of {claimed} bytes in a file of {file_bytes} (at most {MAX_HEADER})"
        ));
    }
    head.resize(8 + claimed as usize, 0);
    file.read_exact(&mut head[8..])?;
    let (header, checksum) = Header::parse(&head[8..])?;
    let expected = header.data_bytes().saturating_add(u128::from(8 + claimed));
    if u128::from(file_bytes) != expected {
        let word = if u128::from(file_bytes) < expected { "cut off" } else { "too long" };
        return corrupt(format!("{word}: {file_bytes} bytes, while its header says {expected}"));
    }
    // The header must be, byte for byte, the one we write: whatever was altered in it shows here or in the checksum.
    if head != header.render(&checksum) {
        return corrupt("altered: the header is not as it was written");
    }
    if header.capacity < header.len {
        return corrupt(format!("{} rows in a store of capacity {}", header.len, header.capacity));
    }
    if let Some(n) = capacity.filter(|&n| n < header.len) {
        return Err(Error::value("capacity", n, format!("at least the {} rows of the file", header.len)).into());
    }

    let mut store = match header.store(capacity.unwrap_or(header.capacity)) {
        Err(error @ Error::Value { .. }) if capacity.is_none() => return corrupt(error.to_string()),
        made => made?,
    };
    let mut hash = Xxh3::new();
    hash.update(&header.render(NO_CHECKSUM));
    // Without rows there is nothing to read, however many heads an altered header may claim.
    let heads = if header.len == 0 { 0 } else { header.kv_heads };
    for rows in store.rows_mut(header.len)? {
        for head in 0..heads {
            for block in rows.head_bytes_mut(head, header.len).chunks_mut(BLOCK) {
                file.read_exact(block)?;
                hash.update(block);
            }
        }
    }
    let found = format!("{:016x}", hash.digest());
    if found != checksum {
        return corrupt(format!("altered: its checksum is {found}, while its header says {checksum}"));
    }
    store.publish(header.len);
    Ok(store)
}

/// What the header says, apart from the checksum.
struct Header {
    kv_heads: usize,
    len: usize,
    head_dim: usize,
    value_dim: usize,
    dtype: DType,
    capacity: usize,
}

const DTYPES: [(DType, &str); 3] = [(DType::F32, "F32"), (DType::F16, "F16"), (DType::BF16, "BF16")];

impl Header {
    /// An empty store of this shape.
    fn store(&self, capacity: usize) -> Result<KvStore> {
        KvStore::new(self.kv_heads, self.head_dim, self.value_dim, self.dtype, capacity)
    }

    fn tensor_bytes(&self, dim: usize) -> u128 {
        // Four factors of 64 bits: saturated, they still differ from the length of any file.
        (self.kv_heads as u128 * self.len as u128).saturating_mul(dim as u128 * self.dtype.size() as u128)
    }

    fn data_bytes(&self) -> u128 {
        self.tensor_bytes(self.head_dim).saturating_add(self.tensor_bytes(self.value_dim))
    }

    /// The first bytes of the file: length and header. Their number does not depend on the checksum.
    fn render(&self, checksum: &str) -> Vec<u8> {
        let Self { kv_heads, len, head_dim, value_dim, dtype, capacity } = self;
        let dtype = DTYPES.iter().find(|(d, _)| d == dtype).expect("every dtype has a name").1;
        let (middle, end) = (self.tensor_bytes(*head_dim), self.data_bytes());
        let mut json = format!(
            concat!(
                r#"{{"__metadata__":{{"format":"{}","version":"{}","capacity":"{}","xxh3":"{}"}},"#,
                r#""keys":{{"dtype":"{}","shape":[{},{},{}],"data_offsets":[0,{}]}},"#,
                r#""values":{{"dtype":"{}","shape":[{},{},{}],"data_offsets":[{},{}]}}}}"#,
            ),
            FORMAT,
            VERSION,
            capacity,
            checksum,
            dtype,
            kv_heads,
            len,
            head_dim,
            middle,
            dtype,
            kv_heads,
            len,
            value_dim,
            middle,
            end,
        );
        // Rows start on a multiple of 8, as safetensors asks.
        json.extend(std::iter::repeat_n(' ', json.len().next_multiple_of(8) - json.len()));
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes
    }

    fn parse(json: &[u8]) -> std::result::Result<(Self, String), Refusal> {
        let header: Value = match serde_json::from_slice(json) {
            Ok(value) => value,
            Err(error) => return corrupt(format!("its header is not JSON: {error}")),
        };
        let metadata = &header["__metadata__"];
        if metadata["format"] != FORMAT {
            return corrupt(format!("not a {FORMAT} file: its format is {}", metadata["format"]));
        }
        if metadata["version"] != VERSION {
            return corrupt(format!("version {} of {FORMAT}, this is version {VERSION}", metadata["version"]));
        }
        let Some(capacity) = metadata["capacity"].as_str().and_then(|text| text.parse().ok()) else {
            return corrupt(format!("its capacity is {}", metadata["capacity"]));
        };
        let Some(checksum) = metadata["xxh3"].as_str().filter(|text| text.len() == NO_CHECKSUM.len()) else {
            return corrupt(format!("its checksum is {}", metadata["xxh3"]));
        };
        let tensor = |name: &str| {
            let (dtype, shape) = (&header[name]["dtype"], &header[name]["shape"]);
            let dtype = DTYPES.iter().find(|(_, text)| dtype == text).map(|(dtype, _)| *dtype);
            let numbers: Option<Vec<usize>> =
                shape.as_array().map(|n| n.iter().filter_map(|n| usize::try_from(n.as_u64()?).ok()).collect());
            match (dtype, numbers.as_deref(), shape.as_array().map(Vec::len)) {
                (Some(dtype), Some(&[heads, len, dim]), Some(3)) if heads > 0 && dim > 0 => {
                    Ok((dtype, heads, len, dim))
                }
                _ => corrupt(format!("its tensor \"{name}\" is {}", header[name])),
            }
        };
        let (keys, values) = (tensor("keys")?, tensor("values")?);
        if (keys.0, keys.1, keys.2) != (values.0, values.1, values.2) {
            return corrupt("its keys and values differ in dtype, heads or length");
        }
        let (dtype, kv_heads, len, head_dim) = keys;
        Ok((Self { kv_heads, len, head_dim, value_dim: values.3, dtype, capacity }, checksum.to_owned()))
    }
}

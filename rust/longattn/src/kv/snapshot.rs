//! Stores in files.
//!
//! A snapshot is a safetensors file: the length of the header (8 bytes, little-endian), a JSON header padded with spaces, then the
//! rows of `keys`, `[kv_heads, len, head_dim]`, and `values`, `[kv_heads, len, value_dim]`. The header's `__metadata__` holds the
//! capacity and an XXH3 checksum of the whole file, taken with zeros in the checksum's own place. A file that is cut off, altered
//! anywhere, or of another kind is refused.
//!
//! Rows of codes are tensors of bytes, `[kv_heads, len, bytes of a row]`; `__metadata__` then also says how they are coded (`codes`),
//! and a third tensor `key_channels`, `[kv_heads, head_dim]`, has the factors of the channels where there are any.

use super::{ChannelScales, Format, KvStore};
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
pub(crate) const NO_CHECKSUM: &str = "0000000000000000";

impl KvStore {
    /// Writes the rows stored now to a file, which appears under `path` complete or not at all. Appends may go on meanwhile.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        replace_file(path.as_ref(), |file| self.write_to(file))
    }

    fn write_to(&self, file: &mut File) -> io::Result<()> {
        let reader = self.read();
        let rows = match self.format() {
            Format::Numbers(dtype) => RowsOf::Numbers(*dtype),
            Format::Codes { bits, group_size, channel_scales } => RowsOf::Codes {
                bits: *bits,
                group_size: *group_size,
                channels: match (channel_scales, self.channel_scales()) {
                    (ChannelScales::Off, _) => Channels::Off,
                    (_, None) => Channels::Awaited,
                    (_, Some(_)) => Channels::Stored,
                },
            },
        };
        let header = Header {
            kv_heads: self.kv_heads(),
            len: reader.len(),
            head_dim: self.head_dim(),
            value_dim: self.value_dim(),
            rows,
            row_bytes: self.row_bytes(),
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
        if header.has_channels() {
            for scale in self.channel_scales().unwrap_or_default() {
                hash.update(&scale.to_le_bytes());
                file.write_all(&scale.to_le_bytes())?;
            }
        }
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&header.render(&format!("{:016x}", hash.digest())))?;
        file.sync_all()
    }

    /// Reads a store from a file that [`save`](Self::save) wrote. It has the capacity of the saved one, or the given capacity.
    pub fn load(path: impl AsRef<Path>, capacity: Option<usize>) -> Result<Self> {
        let path = path.as_ref();
        read_store(path, capacity).map_err(|refusal| refusal.about(path))
    }
}

/// Puts what `write` writes under `path`, complete or not at all.
pub(crate) fn replace_file(path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> Result<()> {
    let io_error = |source| Error::Io { path: path.display().to_string(), source };
    let (mut file, temporary) = create_beside(path).map_err(io_error)?;
    let done = write(&mut file).and_then(|()| fs::rename(&temporary, path));
    if let Err(error) = done {
        // The first error is the one to report; a file left behind changes nothing.
        let _ = fs::remove_file(&temporary);
        return Err(io_error(error));
    }
    // The name is durable only once the folder is.
    File::open(folder_of(path)).and_then(|folder| folder.sync_all()).map_err(io_error)
}

/// A new file in the folder of `path`, under a name that nobody else uses.
fn create_beside(path: &Path) -> io::Result<(File, PathBuf)> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    if path.file_name().is_none() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not the name of a file"));
    }
    // A rename would take the place of a device or a pipe.
    if fs::metadata(path).is_ok_and(|there| !there.is_file() && !there.is_dir()) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
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
pub(crate) enum Refusal {
    Corrupt(String),
    Io(io::Error),
    Other(Error),
}

impl Refusal {
    /// The error for the file `path`.
    pub(crate) fn about(self, path: &Path) -> Error {
        let path = path.display().to_string();
        match self {
            Self::Corrupt(reason) => Error::Corrupt { path, reason },
            Self::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Error::Corrupt { path, reason: "cut off while it was read".into() }
            }
            Self::Io(source) => Error::Io { path, source },
            Self::Other(error) => error,
        }
    }
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

pub(crate) fn corrupt<T>(reason: impl Into<String>) -> std::result::Result<T, Refusal> {
    Err(Refusal::Corrupt(reason.into()))
}

/// Opens a file of ours: the file behind its header, the header with the length in front of it, and the bytes of the file.
pub(crate) fn open_checked(path: &Path, format: &str) -> std::result::Result<(File, Vec<u8>, u64), Refusal> {
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
            "cut off, or not a {format} file: a header of {claimed} bytes in a file of {file_bytes} (at most {MAX_HEADER})"
        ));
    }
    head.resize(8 + claimed as usize, 0);
    file.read_exact(&mut head[8..])?;
    Ok((file, head, file_bytes))
}

fn read_store(path: &Path, capacity: Option<usize>) -> std::result::Result<KvStore, Refusal> {
    let (mut file, head, file_bytes) = open_checked(path, FORMAT)?;
    let (header, checksum) = Header::parse(&head[8..])?;
    let expected = header.data_bytes().saturating_add(head.len() as u128);
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
    let mut channels = vec![];
    if header.has_channels() {
        let mut bytes = vec![0; 4 * header.kv_heads * header.head_dim];
        file.read_exact(&mut bytes)?;
        hash.update(&bytes);
        channels.extend(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)));
    }
    let found = format!("{:016x}", hash.digest());
    if found != checksum {
        return corrupt(format!("altered: its checksum is {found}, while its header says {checksum}"));
    }
    if header.has_channels() {
        store.set_channel_scales(channels);
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
    rows: RowsOf,
    /// Bytes of a row of keys and of values.
    row_bytes: (usize, usize),
    capacity: usize,
}

/// What the rows are, as far as a file says it.
#[derive(Clone, Copy, PartialEq)]
enum RowsOf {
    Numbers(DType),
    Codes { bits: usize, group_size: Option<usize>, channels: Channels },
}

#[derive(Clone, Copy, PartialEq)]
enum Channels {
    Off,
    /// To be set by the first rows, which have not come.
    Awaited,
    Stored,
}

const DTYPES: [(DType, &str); 3] = [(DType::F32, "F32"), (DType::F16, "F16"), (DType::BF16, "BF16")];
const CHANNELS: [(Channels, &str); 3] =
    [(Channels::Off, "off"), (Channels::Awaited, "awaited"), (Channels::Stored, "stored")];

fn name_of<T: PartialEq>(names: &[(T, &'static str)], value: &T) -> &'static str {
    names.iter().find(|(v, _)| v == value).expect("every value has a name").1
}

fn value_of<T: Copy>(names: &[(T, &str)], name: &Value) -> Option<T> {
    names.iter().find(|(_, text)| name == text).map(|(value, _)| *value)
}

impl Header {
    /// An empty store of this shape.
    fn store(&self, capacity: usize) -> Result<KvStore> {
        let format = match self.rows {
            RowsOf::Numbers(dtype) => Format::Numbers(dtype),
            RowsOf::Codes { bits, group_size, channels } => Format::Codes {
                bits,
                group_size,
                channel_scales: if channels == Channels::Off { ChannelScales::Off } else { ChannelScales::FirstRows },
            },
        };
        let store = KvStore::new(self.kv_heads, self.head_dim, self.value_dim, format, capacity)?;
        if store.row_bytes() != self.row_bytes {
            let got = format!("rows of {:?} bytes", self.row_bytes);
            return Err(Error::value("codes", got, format!("{:?}", store.row_bytes())));
        }
        Ok(store)
    }

    fn has_channels(&self) -> bool {
        matches!(self.rows, RowsOf::Codes { channels: Channels::Stored, .. })
    }

    /// Where keys, values and channel factors end in the data. Four factors of 64 bits: saturated, they still differ from the length
    /// of any file.
    fn ends(&self) -> [u128; 3] {
        let rows = self.kv_heads as u128 * self.len as u128;
        let keys = rows.saturating_mul(self.row_bytes.0 as u128);
        let values = keys.saturating_add(rows.saturating_mul(self.row_bytes.1 as u128));
        let channels = if self.has_channels() { 4 * self.kv_heads as u128 * self.head_dim as u128 } else { 0 };
        [keys, values, values.saturating_add(channels)]
    }

    fn data_bytes(&self) -> u128 {
        self.ends()[2]
    }

    /// The first bytes of the file: length and header. Their number does not depend on the checksum.
    fn render(&self, checksum: &str) -> Vec<u8> {
        let Self { kv_heads, len, head_dim, value_dim, rows, row_bytes, capacity } = self;
        let (dtype, widths, codes) = match rows {
            RowsOf::Numbers(dtype) => (name_of(&DTYPES, dtype), (*head_dim, *value_dim), String::new()),
            RowsOf::Codes { bits, group_size, channels } => {
                let (group, channels) = (group_size.unwrap_or(0), name_of(&CHANNELS, channels));
                let codes = format!(r#","codes":"{bits} {group} {head_dim} {value_dim}","channels":"{channels}""#);
                ("U8", *row_bytes, codes)
            }
        };
        let [keys_end, values_end, end] = self.ends();
        let tensor = |name: &str, dtype: &str, shape: &str, start: u128, end: u128| {
            format!(r#","{name}":{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{start},{end}]}}"#)
        };
        let mut json = format!(
            r#"{{"__metadata__":{{"format":"{FORMAT}","version":"{VERSION}","capacity":"{capacity}","xxh3":"{checksum}"{codes}}}"#
        );
        json += &tensor("keys", dtype, &format!("{kv_heads},{len},{}", widths.0), 0, keys_end);
        json += &tensor("values", dtype, &format!("{kv_heads},{len},{}", widths.1), keys_end, values_end);
        if self.has_channels() {
            json += &tensor("key_channels", "F32", &format!("{kv_heads},{head_dim}"), values_end, end);
        }
        json.push('}');
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
            let shape = header[name]["shape"].as_array();
            let numbers: Option<Vec<usize>> =
                shape.map(|n| n.iter().filter_map(|n| usize::try_from(n.as_u64()?).ok()).collect());
            match (numbers.as_deref(), shape.map(Vec::len)) {
                (Some(&[heads, len, width]), Some(3)) if heads > 0 && width > 0 => {
                    Ok((&header[name]["dtype"], heads, len, width))
                }
                _ => corrupt(format!("its tensor \"{name}\" is {}", header[name])),
            }
        };
        let (keys, values) = (tensor("keys")?, tensor("values")?);
        if (keys.0, keys.1, keys.2) != (values.0, values.1, values.2) {
            return corrupt("its keys and values differ in dtype, heads or length");
        }
        let (dtype, kv_heads, len, width) = keys;
        let (rows, head_dim, value_dim, row_bytes) = if let Some(dtype) = value_of(&DTYPES, dtype) {
            let bytes = |width: usize| width.saturating_mul(dtype.size());
            (RowsOf::Numbers(dtype), width, values.3, (bytes(width), bytes(values.3)))
        } else {
            let numbers = metadata["codes"].as_str().unwrap_or_default().split(' ').map(str::parse::<usize>);
            let numbers: Vec<usize> = numbers.filter_map(std::result::Result::ok).collect();
            let channels = value_of(&CHANNELS, &metadata["channels"]);
            let (true, Some(channels), &[bits, group, head_dim, value_dim]) = (dtype == "U8", channels, &numbers[..])
            else {
                return corrupt(format!("its tensor \"keys\" is {}", header["keys"]));
            };
            let group_size = (group > 0).then_some(group);
            (RowsOf::Codes { bits, group_size, channels }, head_dim, value_dim, (width, values.3))
        };
        Ok((Self { kv_heads, len, head_dim, value_dim, rows, row_bytes, capacity }, checksum.to_owned()))
    }
}

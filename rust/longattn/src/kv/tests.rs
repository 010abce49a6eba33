//! Tests of stores and snapshots through the public methods.

use super::region::STEP;
use super::*;
use crate::tensor::{DType, Element, Error, Storage, TensorView};
use half::{bf16, f16};
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const HEADS: usize = 2;
const KEY: usize = 5;
const VALUE: usize = 3;

/// Numbers that tell rows, heads and columns apart and that every dtype holds exactly.
fn number(row: usize, head: usize, column: usize) -> f32 {
    (row % 61) as f32 * 4.0 + head as f32 * 2.0 + (column % 2) as f32
}

fn rows<T: Element>(first: usize, count: usize, dim: usize) -> Vec<T> {
    let cell = |head, row| (0..dim).map(move |column| T::from_f32(number(row, head, column)));
    (0..HEADS).flat_map(|head| (first..first + count).flat_map(move |row| cell(head, row))).collect()
}

fn append<T: Element>(store: &KvStore, first: usize, count: usize) -> crate::tensor::Result<usize> {
    let (k, v) = (rows::<T>(first, count, KEY), rows::<T>(first, count, VALUE));
    let k = TensorView::new(&k, [1, HEADS, count, KEY])?;
    let v = TensorView::new(&v, [1, HEADS, count, VALUE])?;
    store.append(&k, &v)
}

fn store(dtype: DType, capacity: usize) -> KvStore {
    KvStore::new(HEADS, KEY, VALUE, dtype, capacity).unwrap()
}

fn numbers(view: &TensorView) -> Vec<f32> {
    fn all<T: Element>(view: &TensorView) -> Vec<f32> {
        let [_, heads, len, _] = view.shape();
        let row = |head, row| view.row::<T>(0, head, row).iter().map(|x| x.to_f32());
        (0..heads).flat_map(|head| (0..len).flat_map(move |r| row(head, r))).collect()
    }
    match view.dtype() {
        DType::F32 => all::<f32>(view),
        DType::F16 => all::<f16>(view),
        DType::BF16 => all::<bf16>(view),
    }
}

fn contents(store: &KvStore) -> (usize, Vec<f32>, Vec<f32>) {
    let reader = store.read();
    (reader.len(), numbers(&reader.keys().numbers().unwrap()), numbers(&reader.values().numbers().unwrap()))
}

fn expected(len: usize) -> (usize, Vec<f32>, Vec<f32>) {
    (len, rows(0, len, KEY), rows(0, len, VALUE))
}

/// A file name of its own, removed at the end.
struct TempFile(PathBuf);

impl TempFile {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("longattn-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Self(std::env::temp_dir().join(name))
    }

    fn with(bytes: &[u8]) -> Self {
        let file = Self::new();
        std::fs::write(&file.0, bytes).unwrap();
        file
    }
}

impl AsRef<Path> for TempFile {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn dtypes() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::BF16)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn chunks_make_the_same_store_as_one_append(dtype in dtypes(), chunks in prop::collection::vec(0usize..40, 0..12)) {
        let store = store(dtype, 480);
        let mut len = 0;
        for (i, &count) in chunks.iter().enumerate() {
            let new_len = match i % 3 {
                0 => append::<f32>(&store, len, count),
                1 => append::<f16>(&store, len, count),
                _ => append::<bf16>(&store, len, count),
            };
            len += count;
            prop_assert_eq!(new_len.unwrap(), len);
        }
        prop_assert_eq!(contents(&store), expected(len));
    }

    #[test]
    fn appends_and_truncates_follow_a_vector(ops in prop::collection::vec((any::<bool>(), 0usize..50), 0..30)) {
        let store = store(DType::F32, 200);
        let (mut len, mut cuts) = (0, Vec::new());
        for (grow, n) in ops {
            if grow {
                let fits = len + n <= 200;
                prop_assert_eq!(append::<f32>(&store, len, n).is_ok(), fits);
                len += if fits { n } else { 0 };
            } else {
                let before = store.epoch();
                store.truncate(n);
                prop_assert_eq!(store.epoch() - before, u64::from(n < len));
                if n < len {
                    len = n;
                    cuts.push(n);
                }
            }
            prop_assert_eq!(contents(&store), expected(len));
        }
        for since in 0..=cuts.len() {
            prop_assert_eq!(store.low_water(since as u64), cuts[since..].iter().min().copied());
        }
    }

    #[test]
    fn a_fork_shares_nothing(len in 0usize..100, cut in 0usize..100, more in 0usize..50) {
        let store = store(DType::BF16, 150);
        append::<f32>(&store, 0, len).unwrap();
        let fork = store.fork().unwrap();
        prop_assert_ne!(fork.id(), store.id());
        prop_assert_eq!(contents(&fork), expected(len));
        store.truncate(cut);
        append::<f32>(&store, 7, more).unwrap();
        prop_assert_eq!(contents(&fork), expected(len));
        prop_assert_eq!((fork.capacity(), fork.epoch()), (150, 0));
    }

    #[test]
    fn a_saved_store_comes_back(dtype in dtypes(), len in 0usize..100, capacity in prop::option::of(120usize..300)) {
        let (store, file) = (store(dtype, 120), TempFile::new());
        append::<f32>(&store, 0, len).unwrap();
        store.save(&file).unwrap();
        let loaded = KvStore::load(&file, capacity).unwrap();
        prop_assert_eq!(contents(&loaded), expected(len));
        prop_assert_eq!((loaded.storage(), loaded.capacity()), (Storage::Numbers(dtype), capacity.unwrap_or(120)));
        prop_assert_eq!((loaded.kv_heads(), loaded.head_dim(), loaded.value_dim()), (HEADS, KEY, VALUE));
        append::<f32>(&loaded, len, 20).unwrap();
        prop_assert_eq!(contents(&loaded), expected(len + 20));
    }
}

#[test]
fn strided_rows_are_appended_in_their_order() {
    // [T, heads, dim] in memory, as a model's projections leave them, with rows of head_dim 8 of which 5 are used.
    let data: Vec<f32> = (0..12 * HEADS * 8).map(|i| number(i / 8 / HEADS, i / 8 % HEADS, i % 8)).collect();
    let strides = [0, 8, 8 * HEADS as isize, 1];
    let k = TensorView::strided(&data, [1, HEADS, 12, KEY], strides).unwrap();
    let v = TensorView::strided(&data, [1, HEADS, 12, VALUE], strides).unwrap();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let store = store(dtype, 12);
        store.append(&k, &v).unwrap();
        assert_eq!(contents(&store), expected(12));
    }
    // Row stride 0 repeats one row.
    let k = TensorView::strided(&data, [1, HEADS, 3, KEY], [0, 8, 0, 1]).unwrap();
    let v = TensorView::strided(&data, [1, HEADS, 3, VALUE], [0, 8, 0, 1]).unwrap();
    let store = store(DType::F32, 3);
    store.append(&k, &v).unwrap();
    assert_eq!(store.read().keys().numbers().unwrap().row::<f32>(0, 1, 2), rows::<f32>(0, 1, KEY)[KEY..].to_vec());
}

#[test]
fn a_large_append_is_spread_over_heads_and_steps() {
    let (heads, count, dim) = (3, 40_000, 32);
    let data: Vec<f32> = (0..heads * count * dim).map(|i| (i % 8191) as f32).collect();
    let view = TensorView::new(&data, [1, heads, count, dim]).unwrap();
    let store = KvStore::new(heads, dim, dim, DType::F32, count).unwrap();
    store.append(&view, &view).unwrap();
    assert_eq!(numbers(&store.read().values().numbers().unwrap()), data);
    assert_eq!(store.nbytes(), 2 * heads * (count * dim * 4).next_multiple_of(STEP));
}

#[test]
fn bad_input_is_named_and_changes_nothing() {
    let named = |result: crate::tensor::Result<usize>| match result {
        Err(Error::Value { argument, .. }) => argument,
        other => panic!("{other:?}"),
    };
    for (i, name) in ["kv_heads", "head_dim", "value_dim", "capacity"].into_iter().enumerate() {
        let mut n = [HEADS, KEY, VALUE, 10];
        n[i] = 0;
        assert_eq!(named(KvStore::new(n[0], n[1], n[2], DType::F32, n[3]).map(|s| s.len())), name);
    }
    for n in [usize::MAX, usize::MAX / 8, isize::MAX as usize] {
        assert_eq!(named(KvStore::new(HEADS, KEY, VALUE, DType::F32, n).map(|s| s.len())), "capacity");
        assert_eq!(named(KvStore::new(n, KEY, VALUE, DType::F32, 10).map(|s| s.len())), "capacity");
        assert_eq!(named(KvStore::new(HEADS, n, VALUE, DType::F32, 10).map(|s| s.len())), "capacity");
    }
    assert!(matches!(KvStore::new(1, 1, 1, DType::F32, 1 << 59), Err(Error::Memory { .. })));

    let store = store(DType::F32, 10);
    append::<f32>(&store, 0, 4).unwrap();
    let data = vec![0f32; 1000];
    let view = |shape| TensorView::new(&data, shape).unwrap();
    let (k, v) = (view([1, HEADS, 2, KEY]), view([1, HEADS, 2, VALUE]));
    for bad in [[2, HEADS, 2, KEY], [0, HEADS, 2, KEY], [1, HEADS + 1, 2, KEY], [1, HEADS, 2, KEY + 1]] {
        assert_eq!(named(store.append(&view(bad), &v)), "k");
    }
    assert_eq!(named(store.append(&k, &view([1, HEADS, 2, KEY]))), "v");
    assert_eq!(named(store.append(&k, &view([1, HEADS, 3, VALUE]))), "v");
    let error = append::<f32>(&store, 4, 7).unwrap_err().to_string();
    assert!(["7 rows", "on top of 4", "capacity of 10"].iter().all(|part| error.contains(part)), "{error}");
    assert_eq!(contents(&store), expected(4));
    assert_eq!(append::<f32>(&store, 0, 0).unwrap(), 4);
    assert_eq!(append::<f32>(&store, 4, 6).unwrap(), 10);
}

#[test]
fn a_store_can_append_its_own_rows_but_not_those_it_dropped() {
    let store = store(DType::F32, 32);
    append::<f32>(&store, 0, 8).unwrap();
    {
        let reader = store.read();
        store.append(&reader.keys().numbers().unwrap(), &reader.values().numbers().unwrap()).unwrap();
        assert_eq!(
            store.read().keys().numbers().unwrap().row::<f32>(0, 1, 15),
            reader.keys().numbers().unwrap().row::<f32>(0, 1, 7)
        );
    }
    let (k, v) = {
        let reader = store.read();
        let (k, v) = (reader.keys().numbers().unwrap(), reader.values().numbers().unwrap());
        // SAFETY: the store lives to the end of the test and its rows stay readable; nothing writes them while the views are used.
        unsafe {
            let k = TensorView::from_raw("k", k.as_ptr(), k.dtype(), k.shape(), k.strides()).unwrap();
            (k, TensorView::from_raw("v", v.as_ptr(), v.dtype(), v.shape(), v.strides()).unwrap())
        }
    };
    store.truncate(5);
    assert!(matches!(store.append(&k, &v), Err(Error::Value { argument: "k", .. })));
    assert_eq!(contents(&store), expected(5));
}

#[test]
fn rows_never_move_and_a_million_is_only_reserved() {
    let store = KvStore::new(8, 128, 128, DType::BF16, 1 << 20).unwrap();
    assert_eq!(store.nbytes(), 0);
    let data = vec![1f32; 8 * 128 * 64];
    let view = TensorView::new(&data, [1, 8, 64, 128]).unwrap();
    store.append(&view, &view).unwrap();
    let (k, v) = (store.read().keys().numbers().unwrap().as_ptr(), store.read().values().numbers().unwrap().as_ptr());
    for _ in 0..200 {
        store.append(&view, &view).unwrap();
    }
    assert_eq!(
        (k, v),
        (store.read().keys().numbers().unwrap().as_ptr(), store.read().values().numbers().unwrap().as_ptr())
    );
    assert_eq!(store.read().keys().numbers().unwrap().strides(), [8 << 27, 1 << 27, 128, 1]);
    assert_eq!(store.nbytes(), 16 * (201 * 64 * 256usize).next_multiple_of(STEP));
    store.truncate(1);
    assert_eq!(store.nbytes(), 16 * 2 * STEP, "one step is kept above the new length");
    store.append(&view, &view).unwrap();
    assert_eq!(store.read().keys().numbers().unwrap().row::<bf16>(0, 7, 64)[127], bf16::ONE);
}

#[test]
fn small_stores_commit_little() {
    let store = store(DType::F32, 16);
    append::<f32>(&store, 0, 1).unwrap();
    assert_eq!(store.nbytes(), 2 * HEADS * super::region::page_size());
}

#[test]
fn the_truncate_log_stays_small_and_safe() {
    let store = store(DType::F32, 2000);
    for low in 1..=500 {
        append::<f32>(&store, 0, 3).unwrap();
        store.truncate(low);
    }
    for since in 0..500 {
        let low = store.low_water(since).unwrap();
        assert!(low <= since as usize + 1, "a row that was dropped after epoch {since} counts as kept");
        assert!(since < 440 || low == since as usize + 1);
    }
    assert_eq!(store.low_water(500), None);
    store.clear();
    assert_eq!((store.low_water(0), store.low_water(500)), (Some(0), Some(0)));
}

#[test]
fn readers_see_whole_rows_while_others_append_and_truncate() {
    let (store, done) = (store(DType::F32, 4096), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let reader = store.read();
                    let (len, epoch) = (reader.len(), store.epoch());
                    assert_eq!(numbers(&reader.keys().numbers().unwrap()), rows::<f32>(0, len, KEY));
                    assert_eq!(numbers(&reader.values().numbers().unwrap()), rows::<f32>(0, len, VALUE));
                    assert!(reader.epoch() == epoch && store.epoch() == epoch);
                }
            });
        }
        for round in 0..40 {
            let mut len = store.len();
            for count in (1..40).cycle().take(50) {
                len = append::<f32>(&store, len, count).unwrap();
            }
            store.truncate(round * 7);
        }
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn writers_take_turns() {
    let store = store(DType::F32, 4000);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..100).for_each(|_| assert!(append::<f32>(&store, 0, 10).is_ok())));
        }
    });
    let keys = numbers(&store.read().keys().numbers().unwrap());
    let block = rows::<f32>(0, 10, KEY);
    for (head, rows) in keys.chunks(4000 * KEY).enumerate() {
        assert!(rows.chunks(10 * KEY).all(|rows| *rows == block[head * 10 * KEY..(head + 1) * 10 * KEY]));
    }
}

#[test]
fn truncate_waits_for_readers() {
    let store = store(DType::F32, 11);
    append::<f32>(&store, 0, 10).unwrap();
    std::thread::scope(|scope| {
        let reader = store.read();
        let truncate = scope.spawn(|| store.truncate(2));
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!truncate.is_finished() && store.len() == 10);
        // Whoever reads already may read again: that must not wait for the truncate, which waits for the first reader.
        assert_eq!(store.read().len(), 10);
        assert_eq!(append::<f32>(&store, 10, 1).unwrap(), 11);
        drop(reader);
        truncate.join().unwrap();
        assert_eq!(contents(&store), expected(2));
    });
}

fn snapshot_bytes(len: usize) -> Vec<u8> {
    let (store, file) = (store(DType::BF16, 12), TempFile::new());
    append::<f32>(&store, 0, len).unwrap();
    store.save(&file).unwrap();
    std::fs::read(&file).unwrap()
}

fn refused(bytes: &[u8]) -> String {
    match KvStore::load(TempFile::with(bytes), None) {
        Err(Error::Corrupt { reason, .. }) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_altered_byte_is_refused() {
    for len in [0, 3] {
        let bytes = snapshot_bytes(len);
        for i in 0..bytes.len() {
            for flip in [0x01, 0x20, 0x80, 0xff] {
                let mut bytes = bytes.clone();
                bytes[i] ^= flip;
                refused(&bytes);
            }
        }
    }
}

#[test]
fn every_cut_and_every_addition_is_refused() {
    let bytes = snapshot_bytes(3);
    for len in 0..bytes.len() {
        assert!(refused(&bytes[..len]).contains("cut off"), "{len}");
    }
    assert!(refused(&[&bytes[..], b"x"].concat()).contains("too long"));
    KvStore::load(TempFile::with(&bytes), None).unwrap();
}

#[test]
fn foreign_and_hostile_files_are_refused() {
    let file = |claimed: u64, json: &str| [&claimed.to_le_bytes(), json.as_bytes()].concat();
    let whole = |json: &str| file(json.len() as u64, json);
    assert!(refused(&file(1_000_000_000, "{}")).contains("1000000000"));
    assert!(refused(&file(u64::MAX, "{}")).contains("header"));
    assert!(refused(&whole("not json")).contains("JSON"));
    assert!(refused(&whole(&"[".repeat(60_000))).contains("JSON"));
    assert!(refused(&whole("[]")).contains("format"));
    assert!(refused(&whole(r#"{"weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#)).contains("format"));

    let bytes = snapshot_bytes(3);
    let text = String::from_utf8_lossy(&bytes[8..8 + bytes[8..].iter().position(|&b| b == 0).unwrap()]).into_owned();
    let json = &text[..text.rfind('}').unwrap() + 1];
    let altered = |from: &str, to: &str| {
        assert!(json.contains(from), "{from} in {json}");
        refused(&[&whole(&json.replace(from, to))[..], &[0; 96]].concat())
    };
    assert!(altered(r#""version":"1""#, r#""version":"2""#).contains("version"));
    assert!(altered("BF16", "I8").contains("keys"));
    assert!(altered("[2,3,5]", "[2,3]").contains("keys"));
    assert!(altered("[2,3,5]", "[2,3,5,1]").contains("keys"));
    assert!(altered("[2,3,5]", "[2,-3,5]").contains("keys"));
    assert!(altered("[2,3,5]", "[0,3,5]").contains("keys"));
    assert!(altered("[2,3,5]", "[2,4,5]").contains("differ"));
    assert!(altered("[2,3,", "[18446744073709551615,18446744073709551615,").contains("says"));
    assert!(altered("[2,3,", "[18446744073709551615,0,").contains("says"));
    assert!(altered(r#""capacity":"12""#, r#""capacity":"-1""#).contains("capacity"));
    assert!(altered("[0,60]", "[60,0]").contains("header"));
}

#[test]
fn loading_says_what_is_wrong_with_the_arguments() {
    let file = TempFile::with(&snapshot_bytes(3));
    assert!(matches!(KvStore::load(&file, Some(2)), Err(Error::Value { argument: "capacity", .. })));
    assert!(matches!(KvStore::load(&file, Some(0)), Err(Error::Value { argument: "capacity", .. })));
    assert_eq!(KvStore::load(&file, Some(3)).unwrap().capacity(), 3);
    assert!(matches!(KvStore::load(TempFile::new(), None), Err(Error::Io { .. })));
    assert!(matches!(KvStore::load(std::env::temp_dir(), None), Err(Error::Corrupt { .. })));
}

#[test]
fn saving_replaces_a_file_or_leaves_it() {
    let folder = TempFile::new();
    std::fs::create_dir(&folder).unwrap();
    let names = || std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>();
    let path = folder.0.join("store.safetensors");
    let store = store(DType::F16, 10);
    for len in [2, 5] {
        append::<f32>(&store, store.len(), len - store.len()).unwrap();
        store.save(&path).unwrap();
        assert_eq!(KvStore::load(&path, None).unwrap().len(), len);
    }
    assert_eq!(names(), ["store.safetensors"]);
    // A folder in the way: the rename fails and nothing is left behind.
    std::fs::create_dir(folder.0.join("taken")).unwrap();
    assert!(matches!(store.save(folder.0.join("taken")), Err(Error::Io { .. })));
    assert_eq!(names().len(), 2);
    assert!(matches!(store.save(folder.0.join("no folder").join("x")), Err(Error::Io { .. })));
    assert!(matches!(store.save(Path::new("/")), Err(Error::Io { .. })));
    std::fs::remove_dir_all(&folder).unwrap();
}

use super::*;
use crate::dense::{Options, Reduce};
use crate::parallel::Execution;

fn store(slots: usize) -> SlotStore {
    SlotStore::new(2, 3, 2, DType::F32, slots).unwrap()
}

/// Appends `count` rows of ones times the position, to keys and values alike.
fn append(store: &SlotStore, count: usize, keep: Option<&[u8]>, fold: bool) -> Result<Vec<i64>> {
    let first = store.appended();
    let rows = |dim: usize| -> Vec<f32> { (0..2 * count * dim).map(|i| (first + i / dim % count) as f32).collect() };
    let (k, v) = (rows(3), rows(2));
    let (k, v) = (TensorView::new(&k, [1, 2, count, 3])?, TensorView::new(&v, [1, 2, count, 2])?);
    store.append(&k, &v, keep, fold)
}

fn positions(store: &SlotStore) -> Vec<i64> {
    let mut positions = vec![0; 2 * store.slots()];
    store.positions(&mut positions).unwrap();
    positions
}

#[test]
fn the_lowest_free_slots_are_taken_and_heads_differ() {
    let store = store(4);
    assert_eq!(append(&store, 3, Some(&[1, 0, 1, 1, 1, 1]), false).unwrap(), [0, -1, 1, 0, 1, 2]);
    assert_eq!(positions(&store), [0, 2, -1, -1, 0, 1, 2, -1]);
    assert!(append(&store, 2, None, false).is_err(), "head 1 has one slot left");
    assert_eq!(store.appended(), 3);
    assert!(store.evict(&[0, 0, 1, 0, 0, 0, 0, 0], false).is_err(), "a free slot");
    assert_eq!(store.evict(&[1, 0, 0, 0, 0, 1, 0, 0], true).unwrap(), [1, 1]);
    assert_eq!((store.live(), store.folded()), (vec![1, 2], vec![1, 1]));
    assert_eq!(append(&store, 2, None, false).unwrap(), [0, 2, 1, 3]);
    assert_eq!(positions(&store), [3, 2, 4, -1, 0, 3, 2, 4]);
    store.clear();
    assert_eq!((store.appended(), store.live(), positions(&store)), (0, vec![0, 0], vec![-1; 8]));
}

#[test]
fn means_are_those_of_the_rows_that_went() {
    let store = store(8);
    append(&store, 5, Some(&[1, 1, 1, 1, 1, 0, 1, 0, 1, 0]), true).unwrap();
    store.evict(&[0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], true).unwrap();
    let (mut key, mut value) = ([0.0; 3], [0.0; 2]);
    assert_eq!(store.copy_mean(0, &mut key, &mut value).unwrap(), 2);
    assert_eq!((key, value), ([1.5; 3], [1.5; 2]));
    assert_eq!(store.copy_mean(1, &mut key, &mut value).unwrap(), 3);
    assert!(key.iter().chain(&value).all(|x| (x - 2.0).abs() < 1e-12));
}

#[test]
fn weights_are_told_by_slot_and_earlier_queries_see_earlier_rows() {
    let store = store(6);
    append(&store, 4, None, false).unwrap();
    store.evict(&[0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], false).unwrap();
    let q = [1f32; 4 * 2 * 3];
    let q = TensorView::new(&q, [1, 4, 2, 3]).unwrap();
    let options = Options { scale: Some(0.0), ..Options::default() };
    let (mut out, mut lse) = (vec![0f32; 4 * 2 * 2], vec![0f32; 8]);
    let mut out = TensorViewMut::new(&mut out, [1, 4, 2, 2]).unwrap();
    let mut lse = TensorViewMut::new(&mut lse, [1, 4, 2, 1]).unwrap();
    let mut told = vec![9f32; 2 * 2 * 6];
    let observe = Observe::Weights(Reduce::Sum);
    let execution = Execution::default();
    store.attend(q, options, None, None, observe, &mut told, &mut out, &mut lse, &execution).unwrap();
    let thirds = 2.0 / 3.0;
    let expected = [
        [1.0, 0.0, 1.0, 0.0, 0.0, 0.0],
        [thirds, 0.0, thirds, thirds, 0.0, 0.0],
        [thirds, thirds, thirds, 0.0, 0.0, 0.0],
        [0.5, 0.5, 0.5, 0.5, 0.0, 0.0],
    ];
    assert!(told.iter().zip(expected.as_flattened()).all(|(x, y)| (x - y).abs() < 1e-6), "{told:?}");
}

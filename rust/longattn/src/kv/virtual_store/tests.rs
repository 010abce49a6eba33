use super::*;

fn options() -> VirtualOptions {
    VirtualOptions {
        layers: 2,
        kv_heads: 2,
        head_dim: 16,
        value_dim: 8,
        dtype: DType::F32,
        max_requests: 3,
        max_tokens: 500,
        granule: page_size(),
        deferred_reclaim: false,
        eager: 0,
        background: false,
    }
}

fn bytes(rows: &RequestRows, row: usize) -> &[u8] {
    // SAFETY: the rows are committed, and these tests write none while they look.
    unsafe { std::slice::from_raw_parts(rows.keys, rows.tokens * row) }
}

#[test]
fn rows_stay_where_they_are_and_come_back_zero() {
    let store = VirtualStore::new(options()).unwrap();
    let (a, b) = (store.alloc().unwrap(), store.alloc().unwrap());
    store.ensure(a, 10).unwrap();
    store.ensure(b, 300).unwrap();
    let first = store.rows(a, 1).unwrap();
    let k = vec![1.5f32; 10 * 2 * 16];
    let v = vec![2.5f32; 10 * 2 * 8];
    let (k, v) = (TensorView::new(&k, [1, 10, 2, 16]).unwrap(), TensorView::new(&v, [1, 10, 2, 8]).unwrap());
    store.write(a, 1, 0, &k, &v).unwrap();
    assert!(store.write(a, 1, 1, &k, &v).is_err());
    store.ensure(a, 500).unwrap();
    let grown = store.rows(a, 1).unwrap();
    assert_eq!((first.keys, first.values), (grown.keys, grown.values));
    assert!(bytes(&first, 128).chunks(4).all(|x| x == 1.5f32.to_ne_bytes()));
    assert!(bytes(&grown, 128)[10 * 128..].iter().all(|&x| x == 0));
    store.free(a).unwrap();
    assert!(store.ensure(a, 1).is_err());
    assert_eq!(store.alloc().unwrap(), a);
    store.ensure(a, 500).unwrap();
    assert!(bytes(&store.rows(a, 1).unwrap(), 128).iter().all(|&x| x == 0));
}

#[test]
fn too_many_tokens_change_nothing() {
    let store = VirtualStore::new(options()).unwrap();
    let r = store.alloc().unwrap();
    store.ensure(r, 40).unwrap();
    let before = store.committed_bytes();
    assert!(store.ensure(r, 501).is_err());
    assert_eq!((store.committed_bytes(), store.tokens(r).unwrap()), (before, 40));
}

#[test]
fn the_background_thread_stays_a_granule_ahead() {
    let store = VirtualStore::new(VirtualOptions { background: true, eager: 1, ..options() }).unwrap();
    let r = store.alloc().unwrap();
    for tokens in 1..=500 {
        store.ensure(r, tokens).unwrap();
    }
    store.settle();
    let g = page_size();
    let ahead = |row: usize| (500 * row).next_multiple_of(g); // the slot ends there
    assert_eq!(store.committed_bytes(), 2 * (ahead(128) + ahead(64)) + 4 * g);
}

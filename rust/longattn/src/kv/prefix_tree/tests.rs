use super::*;

/// A tree of one head of width 1 whose rows are their tokens.
struct Numbers(PrefixTree);

impl Numbers {
    fn new(chunk_size: usize, capacity: usize) -> Self {
        Self(PrefixTree::new(1, 1, 1, DType::F32, chunk_size, capacity).unwrap())
    }

    fn add(&self, tokens: &[i64]) -> Result<u64> {
        let rows: Vec<f32> = tokens.iter().map(|&t| t as f32).collect();
        let view = TensorView::new(&rows, [1, 1, rows.len(), 1])?;
        self.0.add(tokens, &view, &view)
    }

    fn append(&self, ids: &[u64], tokens: &[i64]) -> Result<()> {
        let rows: Vec<f32> = tokens.iter().map(|&t| t as f32).collect();
        let view = TensorView::new(&rows, [1, 1, rows.len(), 1])?;
        self.0.append(Some(ids), tokens, &view, &view)
    }

    /// Rows of a sequence, where its path says they are.
    fn rows(&self, id: u64) -> Vec<i64> {
        let (reader, size) = (self.0.read(), self.0.chunk_size());
        let path = reader.path(id).unwrap();
        let (keys, values) = (reader.keys(), reader.values());
        let whole = path.chunks.iter().map(|&chunk| (chunk, size));
        let at = whole.chain(path.tail).flat_map(|(chunk, len)| (0..len).map(move |i| chunk as usize * size + i));
        at.map(|row| {
            assert_eq!(keys.row::<f32>(0, 0, row), values.row::<f32>(0, 0, row));
            keys.row::<f32>(0, 0, row)[0] as i64
        })
        .collect()
    }

    fn usage(&self) -> (usize, usize) {
        let reader = self.0.read();
        (reader.chunks(), reader.tokens_stored())
    }
}

#[test]
fn equal_beginnings_are_stored_once() {
    let tree = Numbers::new(2, 100);
    let a = tree.add(&[1, 2, 3, 4, 5]).unwrap();
    let b = tree.add(&[1, 2, 3, 4, 6, 7]).unwrap();
    assert_eq!(tree.usage(), (4, 7));
    assert_eq!(tree.0.read().stored(&[1, 2, 3, 9]), 2);
    // A tail that becomes full is given up for an equal chunk.
    tree.append(&[a], &[9]).unwrap();
    assert_eq!(tree.usage(), (4, 8));
    let c = tree.0.fork(b, 1).unwrap()[0];
    tree.append(&[c, b], &[8, 8]).unwrap();
    tree.append(&[b, c], &[0, 0]).unwrap();
    assert_eq!(tree.usage(), (5, 10));
    for (id, tokens) in
        [(a, vec![1, 2, 3, 4, 5, 9]), (b, vec![1, 2, 3, 4, 6, 7, 8, 0]), (c, vec![1, 2, 3, 4, 6, 7, 8, 0])]
    {
        assert_eq!((tree.rows(id), tree.0.read().tokens(id).unwrap()), (tokens.clone(), tokens));
    }
    for id in [b, a, c] {
        tree.0.remove(id).unwrap();
    }
    assert_eq!(tree.usage(), (0, 0));
}

#[test]
fn what_fails_changes_nothing() {
    let tree = Numbers::new(2, 6);
    let a = tree.add(&[1, 2, 3]).unwrap();
    assert!(tree.add(&[1, 2, 4, 5, 6]).is_err());
    assert!(tree.append(&[a, 7], &[1, 1]).is_err());
    assert!(tree.append(&[a, a], &[1, 1]).is_err());
    assert!(tree.0.fork(a, 2).is_err());
    assert_eq!((tree.usage(), tree.rows(a)), ((2, 3), vec![1, 2, 3]));
    let b = tree.add(&[1, 2, 4]).unwrap();
    assert_eq!((tree.usage(), tree.rows(b)), ((3, 4), vec![1, 2, 4]));
}

#[test]
fn freed_chunks_are_used_again() {
    let tree = Numbers::new(2, 1 << 20);
    let ids: Vec<u64> = (0..50).map(|n| tree.add(&[n, n, n, n, n]).unwrap()).collect();
    for &id in &ids[10..40] {
        tree.0.remove(id).unwrap();
    }
    let more: Vec<u64> = (100..130).map(|n| tree.add(&[n, n, n, n, n]).unwrap()).collect();
    assert_eq!(tree.0.read().keys().shape()[2], 300);
    for (n, id) in (100..130).zip(more) {
        assert_eq!(tree.rows(id), [n; 5]);
    }
}

//! Hash tables of one head: in which bucket of each table a row is, and how often a query meets it.
//!
//! Rows lie in *spans*, sorted by bucket in every table, and the newest in a *tail*, which is looked through whole. A full tail becomes a
//! span; a span that is not shorter than the one before it joins that, so that there are few and a row is moved a few times at most.

use crate::simd::{Kernel, Simd, prefetch};
use std::ops::Range;

/// Rows of a full tail.
pub(super) const TAIL: usize = 4096;

/// The longest span: places in it are 16 bits.
const LONGEST: usize = 1 << 16;

/// Tables of the rows of a head.
#[derive(Clone)]
pub(super) struct Tables {
    tables: usize,
    buckets: usize,
    spans: Vec<Span>,
    /// First row of the tail.
    tail_start: usize,
    tail_rows: usize,
    /// `[tables, TAIL]`.
    tail: Vec<u16>,
}

#[derive(Clone)]
struct Span {
    start: usize,
    /// Rows that count: later ones were cut off.
    rows: usize,
    built: usize,
    /// `[tables, buckets + 1]`: where a bucket's rows start among the table's.
    starts: Vec<u32>,
    /// `[tables, built]`: places of rows in the span, bucket by bucket, ascending in each.
    places: Vec<u16>,
}

impl Tables {
    pub(super) fn new(tables: usize, buckets: usize) -> Self {
        Self { tables, buckets, spans: Vec::new(), tail_start: 0, tail_rows: 0, tail: vec![0; tables * TAIL] }
    }

    pub(super) fn rows(&self) -> usize {
        self.tail_start + self.tail_rows
    }

    pub(super) fn nbytes(&self) -> usize {
        self.spans.iter().map(|span| 4 * span.starts.len() + 2 * span.places.len()).sum::<usize>() + 2 * self.tail.len()
    }

    /// Appends rows: their buckets, `[rows, tables]`.
    pub(super) fn extend(&mut self, buckets: &[u16]) {
        for row in buckets.chunks_exact(self.tables) {
            for (table, &bucket) in row.iter().enumerate() {
                self.tail[table * TAIL + self.tail_rows] = bucket;
            }
            self.tail_rows += 1;
            if self.tail_rows == TAIL {
                self.sort_tail();
            }
        }
    }

    /// Makes a span of the tail.
    fn sort_tail(&mut self) {
        let (tables, buckets, rows) = (self.tables, self.buckets, self.tail_rows);
        let (mut starts, mut places) = (vec![0u32; tables * (buckets + 1)], vec![0u16; tables * rows]);
        for table in 0..tables {
            let of = &self.tail[table * TAIL..][..rows];
            let starts = &mut starts[table * (buckets + 1)..][..buckets + 1];
            for &bucket in of {
                starts[usize::from(bucket) + 1] += 1;
            }
            for b in 0..buckets {
                starts[b + 1] += starts[b];
            }
            let mut next = starts[..buckets].to_vec();
            for (place, &bucket) in of.iter().enumerate() {
                let next = &mut next[usize::from(bucket)];
                places[table * rows + *next as usize] = place as u16;
                *next += 1;
            }
        }
        self.spans.push(Span { start: self.tail_start, rows, built: rows, starts, places });
        (self.tail_start, self.tail_rows) = (self.tail_start + rows, 0);
        while let [.., a, b] = &self.spans[..]
            && b.rows >= a.rows
            && a.rows + b.rows <= LONGEST
        {
            let joined = Span::join(a, b, self.tables, self.buckets);
            self.spans.truncate(self.spans.len() - 2);
            self.spans.push(joined);
        }
    }

    /// Forgets rows from `len` on.
    pub(super) fn cut(&mut self, len: usize) {
        if len >= self.tail_start {
            self.tail_rows = self.tail_rows.min(len - self.tail_start);
            return;
        }
        self.spans.retain(|span| span.start < len);
        if let Some(last) = self.spans.last_mut() {
            last.rows = last.rows.min(len - last.start);
        }
        (self.tail_start, self.tail_rows) = (len, 0);
    }

    /// Buckets of every row, `[tables, rows]`.
    pub(super) fn all(&self) -> Vec<u16> {
        let rows = self.rows();
        let mut all = vec![0u16; self.tables * rows];
        for span in &self.spans {
            for table in 0..self.tables {
                for bucket in 0..self.buckets {
                    for &place in span.bucket(table, bucket, self.buckets) {
                        all[table * rows + span.start + usize::from(place)] = bucket as u16;
                    }
                }
            }
        }
        for table in 0..self.tables {
            all[table * rows + self.tail_start..(table + 1) * rows]
                .copy_from_slice(&self.tail[table * TAIL..][..self.tail_rows]);
        }
        all
    }
}

impl Span {
    /// Places of the rows in a bucket.
    fn bucket(&self, table: usize, bucket: usize, buckets: usize) -> &[u16] {
        let at = table * (buckets + 1) + bucket;
        let places = &self.places[table * self.built..][self.starts[at] as usize..self.starts[at + 1] as usize];
        if self.rows == self.built {
            places
        } else {
            &places[..places.partition_point(|&p| usize::from(p) < self.rows)]
        }
    }

    /// Two spans, one after the other, as one.
    fn join(a: &Self, b: &Self, tables: usize, buckets: usize) -> Self {
        let rows = a.rows + b.rows;
        let mut starts = Vec::with_capacity(tables * (buckets + 1));
        let mut places = Vec::with_capacity(tables * rows);
        for table in 0..tables {
            for bucket in 0..buckets {
                starts.push((places.len() - table * rows) as u32);
                places.extend_from_slice(a.bucket(table, bucket, buckets));
                places.extend(b.bucket(table, bucket, buckets).iter().map(|&place| place + a.rows as u16));
            }
            starts.push(rows as u32);
        }
        Self { start: a.start, rows, built: rows, starts, places }
    }
}

/// The rows inside `inside` that meet a query in at least two tables, with the number of tables, ascending.
pub(super) struct Meet<'a> {
    pub(super) tables: &'a Tables,
    /// The query's bucket in each table.
    pub(super) query: &'a [u16],
    pub(super) inside: Range<usize>,
}

impl Kernel for Meet<'_> {
    /// The rows, and how many entries of the tables were looked at.
    type Output = (Vec<(u32, u8)>, usize);

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Self::Output {
        let Self { tables, query, inside } = self;
        let mut counts = vec![0u8; LONGEST.min(tables.tail_start.max(TAIL))];
        let (mut met, mut entries) = (Vec::new(), 0);
        let mut buckets: Vec<&[u16]> = Vec::with_capacity(query.len());
        for span in tables.spans.iter().filter(|span| span.start < inside.end && span.start + span.rows > inside.start)
        {
            let counts = &mut counts[..span.rows];
            counts.fill(0);
            buckets.clear();
            for (table, &bucket) in query.iter().enumerate() {
                let next = (table + 4).min(query.len() - 1);
                prefetch(&span.starts[next * (tables.buckets + 1) + usize::from(query[next])]);
                let places = span.bucket(table, usize::from(bucket), tables.buckets);
                prefetch(places.as_ptr());
                entries += places.len();
                buckets.push(places);
            }
            for places in &buckets {
                for &place in *places {
                    // No more than 255 tables.
                    counts[usize::from(place)] += 1;
                }
            }
            collect(counts, span.start, &inside, &mut met);
        }
        if tables.tail_rows > 0 && tables.rows() > inside.start && tables.tail_start < inside.end {
            let counts = &mut counts[..tables.tail_rows];
            counts.fill(0);
            for (table, &bucket) in query.iter().enumerate() {
                for (count, &other) in counts.iter_mut().zip(&tables.tail[table * TAIL..][..tables.tail_rows]) {
                    *count += u8::from(other == bucket);
                }
            }
            entries += query.len() * tables.tail_rows;
            collect(counts, tables.tail_start, &inside, &mut met);
        }
        (met, entries)
    }
}

/// Adds the rows that are counted at least twice.
#[inline(always)]
fn collect(counts: &[u8], start: usize, inside: &Range<usize>, met: &mut Vec<(u32, u8)>) {
    for (c, chunk) in counts.chunks(32).enumerate() {
        let mut most = 0;
        for &count in chunk {
            most = if count > most { count } else { most };
        }
        if most < 2 {
            continue;
        }
        for (i, &count) in chunk.iter().enumerate() {
            let row = start + 32 * c + i;
            if count >= 2 && inside.contains(&row) {
                met.push((row as u32, count));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Random;
    use crate::simd::{Isa, dispatch};

    /// The rows as they are, without tables.
    struct Plain(Vec<Vec<u16>>);

    impl Plain {
        fn meet(&self, query: &[u16], inside: Range<usize>) -> Vec<(u32, u8)> {
            let count = |row: &Vec<u16>| row.iter().zip(query).filter(|(a, b)| a == b).count() as u8;
            let met = |r: usize| (r as u32, count(&self.0[r]));
            inside.map(met).filter(|(_, count)| *count >= 2).collect()
        }
    }

    #[test]
    fn growing_and_cutting_keeps_every_row_in_its_buckets() {
        let (tables, buckets) = (5, 8);
        let mut random = Random::new(2);
        let (mut grown, mut plain) = (Tables::new(tables, buckets), Plain(Vec::new()));
        // Cuts into the tail, into spans, to nothing; growth beyond the longest span.
        for (add, keep) in [
            (10, 5),
            (4100, 4090),
            (9000, 9001),
            (13_000, 12_288),
            (60_000, 70_000),
            (20_000, 88_001),
            (100, 30_000),
            (4096, 34_000),
            (1, 0),
            (5000, 4096),
            (8192, 12_288),
        ] {
            let rows: Vec<Vec<u16>> =
                (0..add).map(|_| (0..tables).map(|_| random.below(buckets) as u16).collect()).collect();
            grown.extend(&rows.concat());
            plain.0.extend(rows);
            grown.cut(keep);
            plain.0.truncate(keep);
            assert_eq!(grown.rows(), plain.0.len());
            let all = grown.all();
            for table in 0..tables {
                assert!(plain.0.iter().enumerate().all(|(r, row)| all[table * plain.0.len() + r] == row[table]));
            }
            let n = plain.0.len();
            for inside in [0..n, n / 5..n / 2, n - n / 9..n] {
                let query: Vec<u16> = (0..tables).map(|_| random.below(buckets) as u16).collect();
                let expected = plain.meet(&query, inside.clone());
                for isa in Isa::available() {
                    let (met, entries) = dispatch(isa, Meet { tables: &grown, query: &query, inside: inside.clone() });
                    assert_eq!(met, expected, "{} of {n}", isa.name());
                    assert!(entries <= tables * n);
                }
            }
        }
    }

    #[test]
    fn joined_spans_are_few() {
        let mut grown = Tables::new(2, 4);
        grown.extend(&vec![1; 2 * 40 * TAIL]);
        let lengths: Vec<usize> = grown.spans.iter().map(|span| span.rows / TAIL).collect();
        assert_eq!(lengths, [16, 16, 8]);
    }
}

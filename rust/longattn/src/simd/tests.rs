use super::*;

struct Elementwise<'a>(&'a [f32]);

impl Kernel for Elementwise<'_> {
    /// exp, exp2, exp2_rough, tanh, and the sum and maximum of each vector.
    type Output = ([Vec<f32>; 4], Vec<(f32, f32)>);
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let (mut exp, mut exp2, mut rough, mut tanh, mut folds) = (vec![], vec![], vec![], vec![], vec![]);
        for chunk in self.0.chunks(S::LANES) {
            let mut out = [0f32; MAX_LANES];
            // SAFETY: the chunk has chunk.len() elements and the buffer MAX_LANES.
            unsafe {
                let x = s.load_first(chunk.as_ptr(), chunk.len());
                s.store(out.as_mut_ptr(), s.exp(x));
                exp.extend_from_slice(&out[..chunk.len()]);
                s.store(out.as_mut_ptr(), s.exp2(x));
                exp2.extend_from_slice(&out[..chunk.len()]);
                s.store(out.as_mut_ptr(), s.exp2_rough(x));
                rough.extend_from_slice(&out[..chunk.len()]);
                s.store(out.as_mut_ptr(), s.tanh(x));
                tanh.extend_from_slice(&out[..chunk.len()]);
                folds.push((s.sum(x), s.max_lane(x)));
            }
        }
        ([exp, exp2, rough, tanh], folds)
    }
}

#[test]
fn exp_and_tanh_on_every_isa() {
    let xs: Vec<f32> = (-8800..=880).map(|i| i as f32 * 0.01).collect();
    for isa in Isa::available() {
        let ([exp, exp2, rough, tanh], _) = dispatch(isa, Elementwise(&xs));
        for (i, ((&x, &e), &t)) in xs.iter().zip(&exp).zip(&tanh).enumerate() {
            let exact = f64::from(x).exp2();
            for two in [exp2[i], rough[i]] {
                assert!((f64::from(two) - exact).abs() <= 3e-7 * exact, "{}: 2^{x} = {two}", isa.name());
            }
            let exact = f64::from(x).exp();
            if x >= -86.9 {
                assert!((f64::from(e) - exact).abs() <= 2.5e-7 * exact, "{}: exp({x}) = {e}", isa.name());
            } else {
                assert!(f64::from(e) <= exact * 1.001, "{}: exp({x}) = {e}", isa.name());
            }
            let exact = f64::from(x).tanh();
            assert!((f64::from(t) - exact).abs() <= 3e-7 * exact.abs(), "{}: tanh({x}) = {t}", isa.name());
        }
        let ([exp, exp2, rough, _], _) = dispatch(isa, Elementwise(&[f32::NEG_INFINITY, f32::NAN, 0.0, -1e30]));
        for special in [exp, exp2, rough] {
            assert_eq!(special[0], 0.0, "{}", isa.name());
            assert!(special[1].is_nan(), "{}", isa.name());
            assert_eq!(special[2], 1.0, "{}", isa.name());
            assert_eq!(special[3], 0.0, "{}", isa.name());
        }
        // What is too large, and NaN of any bits.
        let nan = f32::from_bits(0x7f80_0101);
        let ([exp, exp2, ..], _) =
            dispatch(isa, Elementwise(&[f32::INFINITY, 1e30, 200.0, 88.8, nan, 88.7, -86.9, 127.5]));
        assert_eq!(exp[..4], [f32::INFINITY; 4], "{}", isa.name());
        assert_eq!(exp2[..3], [f32::INFINITY; 3], "{}", isa.name());
        assert!(exp[4].is_nan() && exp2[4].is_nan(), "{}", isa.name());
        for (x, found, exact) in [(88.7f32, exp[5], 88.7f32 as f64), (-86.9, exp[6], -86.9f32 as f64)] {
            assert!((f64::from(found) / exact.exp() - 1.0).abs() < 2.5e-7, "{}: exp({x}) = {found}", isa.name());
        }
        assert!((f64::from(exp2[7]) / 127.5f64.exp2() - 1.0).abs() < 3e-7, "{}: {}", isa.name(), exp2[7]);
    }
}

struct Widen<'a, T>(&'a [T]);

impl<T: Element> Kernel for Widen<'_, T> {
    type Output = Vec<f32>;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<f32> {
        let mut out = vec![0f32; self.0.len() + MAX_LANES];
        for (i, chunk) in self.0.chunks(S::LANES).enumerate() {
            // SAFETY: a whole chunk has LANES elements, a ragged one is read by its length; out has room for a vector more.
            unsafe {
                let v = if chunk.len() == S::LANES {
                    s.load_as(chunk.as_ptr())
                } else {
                    s.load_first(chunk.as_ptr(), chunk.len())
                };
                s.store(out.as_mut_ptr().add(i * S::LANES), v);
            }
        }
        out.truncate(self.0.len());
        out
    }
}

#[test]
fn every_half_value_widens_exactly() {
    let f16s: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
    let bf16s: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
    for isa in Isa::available() {
        let same = |a: f32, b: f32| a == b || (a.is_nan() && b.is_nan());
        assert!(dispatch(isa, Widen(&f16s[..65535])).iter().zip(&f16s).all(|(&x, h)| same(x, h.to_f32())));
        assert!(dispatch(isa, Widen(&bf16s[..65535])).iter().zip(&bf16s).all(|(&x, h)| same(x, h.to_f32())));
    }
}

struct Bytes<'a>(&'a [u8; 4 * MAX_LANES], &'a [u8; 4 * MAX_LANES]);

impl Kernel for Bytes<'_> {
    type Output = Vec<f32>;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<f32> {
        let mut out = vec![0f32; MAX_LANES];
        for i in (0..MAX_LANES).step_by(S::LANES) {
            // SAFETY: both arrays hold 4 * MAX_LANES bytes, out MAX_LANES floats.
            unsafe {
                let nibbles =
                    s.and(s.shift_right_16::<4>(s.load_bytes(self.0.as_ptr().add(4 * i))), s.splat_i32(0x0f0f_0f0f));
                let dots = s.dot4(s.splat_i32(7), nibbles, s.load_bytes(self.1.as_ptr().add(4 * i)));
                s.store(out.as_mut_ptr().add(i), s.to_f32(dots));
            }
        }
        out
    }
}

#[test]
fn byte_dots_on_every_isa() {
    let a: [u8; 64] = std::array::from_fn(|i| (i * 37 + 11) as u8);
    let b: [u8; 64] = std::array::from_fn(|i| (i * 91 + 128) as u8);
    let expected: Vec<f32> = (0..MAX_LANES)
        .map(|i| (7 + (0..4).map(|t| i32::from(a[4 * i + t] >> 4) * i32::from(b[4 * i + t] as i8)).sum::<i32>()) as f32)
        .collect();
    for isa in Isa::available() {
        assert_eq!(dispatch(isa, Bytes(&a, &b)), expected, "{}", isa.name());
    }
}

struct Lookups<'a>(&'a [u8; 256], &'a [u8; 2 * 4 * MAX_LANES]);

impl Kernel for Lookups<'_> {
    type Output = [Vec<u8>; 2];
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> [Vec<u8>; 2] {
        struct Inner<'a>(Lookups<'a>);
        impl Kernel for Inner<'_> {
            type Output = [Vec<u8>; 2];
            #[inline(always)]
            fn run<S: Simd>(self, s: S) -> [Vec<u8>; 2] {
                let Lookups(table, bytes) = self.0;
                let mut out = [vec![0; bytes.len()], vec![0; bytes.len()]];
                let width = 4 * S::LANES;
                for i in (0..bytes.len()).step_by(2 * width) {
                    // SAFETY: the bytes are a multiple of two vectors of any instruction set, the table has 256 entries.
                    unsafe {
                        let x = [s.load_bytes(bytes.as_ptr().add(i)), s.load_bytes(bytes.as_ptr().add(i + width))];
                        let found = s.lookup256(table.as_ptr(), x);
                        let small = s.load_table16(table.as_ptr().add(32));
                        for n in 0..2 {
                            s.store_bytes(out[0].as_mut_ptr().add(i + n * width), found[n]);
                            let low = s.lookup16(small, s.and(x[n], s.splat_i32(0x0f0f_0f0f)));
                            s.store_bytes(out[1].as_mut_ptr().add(i + n * width), s.add_i32(low, low));
                        }
                    }
                }
                out
            }
        }
        s.call_tables(Inner(self))
    }
}

#[test]
fn lookups_on_every_isa() {
    // Entries below 128 do not carry into the next byte when doubled.
    let table: [u8; 256] = std::array::from_fn(|i| (i * 77 + 5) as u8 & 127);
    for start in 0..2 {
        let bytes: [u8; 128] = std::array::from_fn(|i| (i + 128 * start) as u8);
        let expected = [bytes.map(|b| table[usize::from(b)]), bytes.map(|b| 2 * table[32 + usize::from(b & 15)])];
        for isa in Isa::available() {
            let found = dispatch(isa, Lookups(&table, &bytes));
            assert!(found[0] == expected[0] && found[1] == expected[1], "{}", isa.name());
        }
    }
}

struct Transpose<'a>(&'a [f32; 20 * 16]);

impl Kernel for Transpose<'_> {
    type Output = (usize, Vec<f32>);
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let mut out = vec![0f32; 18 * 16];
        // SAFETY: 16 rows of 20 and of 18 floats hold a block of up to 16 x 16.
        unsafe { s.transpose(self.0.as_ptr(), 20, out.as_mut_ptr(), 18) };
        (S::LANES, out)
    }
}

#[test]
fn transpose_on_every_isa() {
    let from: [f32; 320] = std::array::from_fn(|i| i as f32);
    for isa in Isa::available() {
        let (n, out) = dispatch(isa, Transpose(&from));
        for i in 0..n {
            for j in 0..n {
                assert_eq!(out[j * 18 + i], from[i * 20 + j], "{} {i} {j}", isa.name());
            }
        }
    }
}

struct Turn<'a>(&'a [f32; 4 * MAX_LANES]);

impl Kernel for Turn<'_> {
    /// Lanes; four vectors turned; which lanes of the first are at least those of the second.
    type Output = (usize, Vec<f32>, u32);
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let mut v = [s.zero(); 4];
        let mut out = vec![0f32; 4 * S::LANES];
        // SAFETY: four vectors of MAX_LANES floats, and room for four of LANES.
        unsafe {
            for (i, v) in v.iter_mut().enumerate() {
                *v = s.load(self.0.as_ptr().add(i * MAX_LANES));
            }
            for (t, turned) in s.turn4(v).into_iter().enumerate() {
                s.store(out.as_mut_ptr().add(t * S::LANES), turned);
            }
        }
        (S::LANES, out, s.at_least(v[0], v[1]))
    }
}

#[test]
fn turns_and_comparisons_on_every_isa() {
    let mut from: [f32; 4 * MAX_LANES] = std::array::from_fn(|i| (i * 29 % 31) as f32);
    (from[3], from[MAX_LANES]) = (f32::NAN, from[0]);
    for isa in Isa::available() {
        let (n, out, bits) = dispatch(isa, Turn(&from));
        for (i, x) in out.iter().enumerate() {
            let (t, lane) = (i / n, i % n);
            let expected = from[lane % 4 * MAX_LANES + lane / 4 * 4 + t];
            assert_eq!(x.to_bits(), expected.to_bits(), "{} {i}", isa.name());
        }
        for lane in 0..32 {
            let expected = lane < n && from[lane] >= from[MAX_LANES + lane];
            assert_eq!(bits >> lane & 1 == 1, expected, "{} {lane}", isa.name());
        }
    }
}

/// Halves of the bytes of the first row.
struct Halves<'a>(&'a [u8], usize);

impl Kernel for Halves<'_> {
    type Output = (usize, Vec<u8>);
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let mut out = vec![0; 4 * S::LANES];
        let n = self.1.min(2 * S::LANES);
        // SAFETY: there are more bytes than asked for, and room for a vector.
        unsafe { s.store_bytes(out.as_mut_ptr(), s.load_halves(self.0.as_ptr(), n)) };
        (n, out)
    }
}

#[test]
fn halves_of_bytes_on_every_isa() {
    let bytes: Vec<u8> = (0..64).map(|i| (i * 37 % 251) as u8).collect();
    for isa in Isa::available() {
        for n in [32, 31, 16, 8, 3, 0] {
            let (n, halves) = dispatch(isa, Halves(&bytes, n));
            let (low, high) = halves.split_at(halves.len() / 2);
            for i in 0..low.len() {
                let expected = if i < n { [bytes[i] & 15, bytes[i] >> 4] } else { [0; 2] };
                assert_eq!([low[i], high[i]], expected, "{} {n} {i}", isa.name());
            }
        }
    }
}

/// Rows and how many of their bytes.
struct Words<'a>(&'a [u8], usize);

impl Kernel for Words<'_> {
    /// Lanes, transposed words, interleaved bytes in order.
    type Output = (usize, Vec<u8>, Vec<f32>);
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let Self(bytes, n) = self;
        let n = n.min(4 * S::LANES);
        let mut rows = [bytes.as_ptr(); MAX_LANES];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = row.wrapping_add(i * 70);
        }
        let mut words = vec![0; 4 * S::LANES * S::LANES];
        let mut sums = vec![0f32; 4 * S::LANES];
        // SAFETY: MAX_LANES rows of 70 bytes, of which n from byte 5 on are asked for; room for LANES vectors, then for four.
        unsafe {
            let mut lanes = LaneRows { first: rows[0], distances: [0; MAX_LANES] };
            for (lane, distance) in lanes.distances.iter_mut().enumerate() {
                *distance = 70 * lane as isize;
            }
            s.transpose_words(&lanes, 5, n, words.as_mut_ptr());
            for (which, floats) in s.load_pairs(&lanes, 11).into_iter().enumerate() {
                let mut loaded = [0f32; MAX_LANES];
                s.store(loaded.as_mut_ptr(), floats);
                for (row, loaded) in rows.iter().zip(&loaded[..S::LANES]) {
                    let expected = row.wrapping_add(11 + 4 * which).cast::<f32>().read_unaligned();
                    assert_eq!(loaded.to_bits(), expected.to_bits());
                }
            }
            let mut first = [s.splat_i32(0); 4];
            for (x, row) in first.iter_mut().zip(rows) {
                *x = s.load_bytes_first(row, n);
            }
            let four = s.interleave(first);
            let weights = s.splat_i32(i32::from_ne_bytes([1, 2, 3, 4]));
            let mut dots = [s.zero(); 4];
            for (dot, x) in dots.iter_mut().zip(four) {
                *dot = s.to_f32(s.dot4(s.splat_i32(0), s.and(x, s.splat_i32(0x0f0f_0f0f)), weights));
            }
            for (t, v) in s.in_order(dots).into_iter().enumerate() {
                s.store(sums.as_mut_ptr().add(t * S::LANES), v);
            }
        }
        (S::LANES, words, sums)
    }
}

#[test]
fn words_and_bytes_of_rows_on_every_isa() {
    let bytes: Vec<u8> = (0..MAX_LANES * 70 + 5).map(|i| (i * 37 % 251) as u8).collect();
    for isa in Isa::available() {
        for n in [64, 63, 32, 17, 5, 1] {
            let (lanes, words, sums) = dispatch(isa, Words(&bytes, n));
            let n = n.min(4 * lanes);
            for (i, &byte) in words.iter().enumerate() {
                let (t, lane, b) = (i / 4 / lanes, i / 4 % lanes, i % 4);
                let at = 4 * t + b;
                assert_eq!(byte, if at < n { bytes[lane * 70 + 5 + at] } else { 0 }, "{} {n} {i}", isa.name());
            }
            for (i, &sum) in sums.iter().enumerate() {
                let of_row = |c: usize| if i < n { f32::from(bytes[c * 70 + i] & 15) } else { 0.0 };
                let expected: f32 = (0..4).map(|c| (c + 1) as f32 * of_row(c)).sum();
                assert_eq!(sum, expected, "{} {n} {i}", isa.name());
            }
        }
    }
}

/// Numbers, whose digits are asked for.
struct Digits<'a>(&'a [f32]);

impl Kernel for Digits<'_> {
    type Output = Vec<u8>;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<u8> {
        let mut bytes = vec![0; 4 * self.0.len()];
        for (x, to) in self.0.chunks_exact(S::LANES).zip(bytes.chunks_exact_mut(4 * S::LANES)) {
            // SAFETY: LANES floats, and four bytes for each.
            unsafe { s.store_bytes(to.as_mut_ptr(), s.digits(s.load(x.as_ptr()))) };
        }
        bytes
    }
}

#[test]
fn digits_on_every_isa() {
    let largest = 127.0 * 65536.0;
    let edges = [0.0, 0.4, 0.6, 1.0, 127.0, 127.6, 128.0, 255.0, 256.0, 32639.0, 32640.0, 32767.0, 32768.0, 65535.0];
    let all: Vec<f32> =
        edges.into_iter().chain((0..4 * MAX_LANES + 2).map(|i| largest * (i as f32 / 60.0).min(1.0).powi(3))).collect();
    let all = &all[..all.len() / MAX_LANES * MAX_LANES];
    for isa in Isa::available() {
        let bytes = dispatch(isa, Digits(all));
        for (x, bytes) in all.chunks(4).zip(bytes.chunks(16)) {
            for (lane, x) in x.iter().enumerate() {
                let [c, b, a] = [bytes[lane], bytes[4 + lane], bytes[8 + lane]].map(|byte| i32::from(byte as i8));
                assert_eq!((65536 * a + 256 * b + c) as f32, x.round_ties_even(), "{} {x}", isa.name());
            }
        }
    }
}

/// The lanes that are written for every set of bits.
struct Chosen;

impl Kernel for Chosen {
    type Output = (usize, Vec<Vec<f32>>);
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let lanes: Vec<f32> = (0..S::LANES).map(|lane| lane as f32).collect();
        let mut written = vec![];
        for bits in 0..1u32 << S::LANES {
            let mut to = [-1f32; MAX_LANES];
            // SAFETY: both have LANES floats.
            unsafe { s.store_some(to.as_mut_ptr(), s.load(lanes.as_ptr()), bits) };
            written.push(to[..bits.count_ones() as usize].to_vec());
        }
        (S::LANES, written)
    }
}

#[test]
fn chosen_lanes_on_every_isa() {
    for isa in Isa::available() {
        let (lanes, written) = dispatch(isa, Chosen);
        for (bits, written) in written.iter().enumerate() {
            let chosen: Vec<f32> = (0..lanes).filter(|lane| bits >> lane & 1 == 1).map(|lane| lane as f32).collect();
            assert_eq!(written, &chosen, "{}: {bits:b}", isa.name());
        }
    }
}

/// So many products of the same bytes, added up.
struct ShortSums(u8, i8, usize);

impl Kernel for ShortSums {
    type Output = Vec<f32>;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<f32> {
        let Self(a, b, times) = self;
        let mut sums = s.splat_i32(0);
        for _ in 0..times {
            sums = s.dot4_short(
                sums,
                s.splat_i32(i32::from_ne_bytes([a; 4])),
                s.splat_i32(i32::from_ne_bytes([b as u8; 4])),
            );
        }
        let mut out = vec![0f32; S::LANES];
        // SAFETY: there is room for LANES floats.
        unsafe { s.store(out.as_mut_ptr(), s.to_f32(s.lengthen(sums))) };
        out
    }
}

#[test]
fn short_sums_on_every_isa() {
    // As many of the largest products as halves of 16 bits hold, two at a time.
    for (a, b, times) in [(15, 127, 8), (15, -127, 8), (3, 127, 43), (1, -127, 129), (7, -3, 0)] {
        for isa in Isa::available() {
            for sum in dispatch(isa, ShortSums(a, b, times)) {
                assert_eq!(sum, 4.0 * f32::from(a) * f32::from(b) * times as f32, "{}: {a} {b} {times}", isa.name());
            }
        }
    }
}

/// Products with stored rows of 64 elements.
struct Stored<'a> {
    storage: Storage,
    rows: &'a [Vec<u8>],
    /// Whether rows to come are asked for.
    asks: bool,
    /// Rows of queries, weights and outputs, and the last of weights and outputs.
    of: [usize; 2],
    /// Rows that are added.
    added: usize,
    /// Four rows each of 64 queries, weights and 64 outputs.
    floats: [&'a [f32]; 3],
}

impl Kernel for Stored<'_> {
    /// Dot products of each query row with the first rows, and outputs to which the first rows were added under the weights; none where there
    /// is nothing of the kind.
    type Output = Option<(Vec<Vec<f32>>, Vec<f32>)>;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        if !S::MULTIPLIES_STORED {
            return None;
        }
        Some(match self.of[0] {
            4 => self.of::<S, 4, { stored_keys(4) }>(s),
            2 => self.of::<S, 2, { stored_keys(2) }>(s),
            _ => self.of::<S, 1, { stored_keys(1) }>(s),
        })
    }
}

impl Stored<'_> {
    #[inline(always)]
    fn of<S: Simd, const R: usize, const C: usize>(self, s: S) -> (Vec<Vec<f32>>, Vec<f32>) {
        let Self { storage, rows, asks, of: [_, last], added, floats: [queries, weights, outputs] } = self;
        let mut outputs = outputs.to_vec();
        let list: Vec<*const u8> = rows.iter().map(|row| row.as_ptr()).collect();
        let queries: [_; R] = std::array::from_fn(|r| queries[64 * r..].as_ptr());
        let keys: [_; C] = std::array::from_fn(|c| list[c]);
        let next = asks.then_some(Next { start: list[0], pace: 1 });
        // SAFETY: rows, queries and outputs have 64 elements each, and there is a weight for each row.
        unsafe {
            let sums = s.sums(s.stored_dots(storage, keys, next, queries, 64 / STORED_STEP));
            for d in (0..64).step_by(stored_columns(R)) {
                let (w, stride) = (weights.as_ptr(), if last == 0 { 0 } else { rows.len() });
                s.add_stored::<R>(storage, &list[..added], next, d, last, w, stride, outputs.as_mut_ptr(), 64);
            }
            (sums.map(|row| row.to_vec()).to_vec(), outputs)
        }
    }
}

#[test]
fn products_with_stored_rows_on_every_isa() {
    let mut seed = 3u64;
    let mut random = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let numbers = [DType::F32, DType::F16, DType::BF16].map(Storage::Numbers);
    for storage in numbers.into_iter().chain([Storage::Codes(8), Storage::Codes(4)]) {
        for n in 6..=13 {
            let mut values = vec![];
            let rows: Vec<Vec<u8>> = (0..n)
                .map(|_| {
                    let row: Vec<f32> = (0..64).map(|_| random()).collect();
                    let codes: Vec<u8> = row.iter().map(|x| (x.abs() * 255.0) as u8).collect();
                    let (of_row, bytes): (Vec<f32>, Vec<u8>) = match storage {
                        Storage::Numbers(DType::F32) => {
                            (row.clone(), row.iter().flat_map(|x| x.to_ne_bytes()).collect())
                        }
                        Storage::Numbers(DType::F16) => {
                            let halves: Vec<f16> = row.iter().map(|&x| f16::from_f32(x)).collect();
                            (
                                halves.iter().map(|x| x.to_f32()).collect(),
                                halves.iter().flat_map(|x| x.to_ne_bytes()).collect(),
                            )
                        }
                        Storage::Numbers(DType::BF16) => {
                            let halves: Vec<bf16> = row.iter().map(|&x| bf16::from_f32(x)).collect();
                            (
                                halves.iter().map(|x| x.to_f32()).collect(),
                                halves.iter().flat_map(|x| x.to_ne_bytes()).collect(),
                            )
                        }
                        Storage::Codes(4) => {
                            let of_row = codes.iter().map(|&code| f32::from(code & 15)).collect();
                            // Channels 32 i + b and 32 i + 16 + b share byte 16 i + b.
                            let byte = |i: usize| {
                                let low = i / 16 * 32 + i % 16;
                                codes[low] & 15 | codes[low + 16] << 4
                            };
                            (of_row, (0..32).map(byte).collect())
                        }
                        Storage::Codes(_) => (codes.iter().map(|&code| f32::from(code)).collect(), codes),
                    };
                    values.push(of_row);
                    bytes
                })
                .collect();
            let floats: [Vec<f32>; 3] = [256, 4 * n, 256].map(|len| (0..len).map(|_| random()).collect());
            let [queries, weights, outputs] = &floats;
            let of_floats = [queries.as_slice(), weights.as_slice(), outputs.as_slice()];
            let of = [[4, 3], [4, 2], [4, 0], [2, 1], [1, 0]];
            for (isa, of) in Isa::available().into_iter().flat_map(|isa| of.map(|of| (isa, of))) {
                let (last, added) = (of[1], n - 6);
                let Some((dots, sums)) =
                    dispatch(isa, Stored { storage, rows: &rows, asks: n % 2 == 0, of, added, floats: of_floats })
                else {
                    continue;
                };
                for (r, dots) in dots.iter().enumerate() {
                    for (c, &dot) in dots.iter().enumerate() {
                        let products = || (0..64).map(|d| f64::from(queries[64 * r + d]) * f64::from(values[c][d]));
                        let (exact, terms) = (products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
                        let error = (f64::from(dot) - exact).abs();
                        assert!(error <= 1e-6 * terms, "{}: {storage}, row {r}, key {c}: {error:e}", isa.name());
                    }
                    for d in 0..64 {
                        // In the order of the rows, each product and sum rounded once.
                        let added = if r <= last { 0..added } else { 0..0 };
                        let expected =
                            added.fold(outputs[64 * r + d], |sum, j| weights[r * n + j].mul_add(values[j][d], sum));
                        let found = sums[64 * r + d];
                        assert_eq!(found, expected, "{}: {storage}, {n} rows, row {r}, column {d}", isa.name());
                    }
                }
            }
        }
    }
}

//! Which row lies in which slot of the cache, and what is copied when rows fork. Pure: no tensors.
//!
//! Slots stay where they are. The first continuation of a row stays in its slot; others get free slots, and only those positions are
//! copied that differ from what stands there already: rows of one request share their prefix, and mostly more.

use crate::runtime::Move;

/// A row that is live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Where its keys and values lie.
    pub slot: usize,
    /// Positions in the cache.
    pub length: usize,
    /// Positions in front that position ids do not count.
    pub offset: usize,
    /// Positions of what the encoder made of its prefix; 1 where there is no encoder.
    pub n_encoded: usize,
}

/// What rows that fork take along.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Moves {
    /// Of keys and values of what was read and written.
    pub past: Vec<Move>,
    /// Of keys and values of what the encoder made.
    pub encoded: Vec<Move>,
}

/// All slots, and the live rows in the order in which they were last named.
#[derive(Debug, Default)]
pub struct Rows {
    slots: Vec<Slot>,
    live: Vec<Row>,
    n_stamps: u64,
}

/// What stands in a slot. Equal stamps at one position mean equal keys and values.
#[derive(Clone, Debug, Default)]
struct Slot {
    is_taken: bool,
    past: Vec<u64>,
    encoded: u64,
}

impl Rows {
    /// Free slots.
    pub fn new(n_slots: usize) -> Self {
        Self { slots: vec![Slot::default(); n_slots], ..Self::default() }
    }

    /// The live rows.
    pub fn live(&self) -> &[Row] {
        &self.live
    }

    /// Slots, free ones included.
    pub fn n_slots(&self) -> usize {
        self.slots.len()
    }

    /// Goes on with so many slots: the live rows take the first of them, in order, and the others hold nothing.
    ///
    /// # Panics
    /// If there are more rows than slots.
    pub fn resize(&mut self, n_slots: usize) {
        assert!(self.live.len() <= n_slots, "there is a slot for every row");
        let mut slots = vec![Slot::default(); n_slots];
        for (slot, row) in self.live.iter_mut().enumerate() {
            slots[slot] = std::mem::take(&mut self.slots[row.slot]);
            row.slot = slot;
        }
        self.slots = slots;
    }

    /// Adds a row behind the live ones and gives it a slot, which `row` names.
    ///
    /// # Panics
    /// If no slot is free.
    pub fn open(&mut self, row: Row) -> Row {
        let stamp = self.stamp();
        let slot = self.slots.iter().position(|slot| !slot.is_taken).expect("there is a slot for every row");
        self.slots[slot] = Slot { is_taken: true, past: vec![stamp; row.length], encoded: stamp };
        self.live.push(Row { slot, ..row });
        Row { slot, ..row }
    }

    /// Replaces the live rows by continuations of `parents`, and tells what must be copied first. No slot is both read and written.
    ///
    /// # Panics
    /// If there are more rows than slots.
    pub fn fork(&mut self, parents: &[usize]) -> Moves {
        self.slots.iter_mut().for_each(|slot| slot.is_taken = false);
        let stays: Vec<bool> = parents.iter().map(|parent| !std::mem::replace(self.taken(*parent), true)).collect();
        let mut moves = Moves::default();
        let forked = |(parent, stays): (&usize, bool)| {
            let row = self.live[*parent];
            let slot = if stays { row.slot } else { Self::follow(&mut self.slots, row, &mut moves) };
            Row { slot, ..row }
        };
        self.live = parents.iter().zip(stays).map(forked).collect();
        moves
    }

    /// Every live row gets one more position.
    pub fn advance(&mut self) {
        for row in &mut self.live {
            self.n_stamps += 1;
            self.slots[row.slot].past.push(self.n_stamps);
            row.length += 1;
        }
        // A slot without a row is written to as well, at its first position.
        self.slots.iter_mut().filter(|slot| !slot.is_taken).for_each(|slot| slot.past.clear());
    }

    /// Forgets all live rows but these.
    pub fn keep(&mut self, rows: &[usize]) {
        self.live = rows.iter().map(|row| self.live[*row]).collect();
        self.slots.iter_mut().for_each(|slot| slot.is_taken = false);
        self.live.iter().for_each(|row| self.slots[row.slot].is_taken = true);
    }

    /// The slot that needs the fewest copies to hold what `row` holds.
    fn follow(slots: &mut [Slot], row: Row, moves: &mut Moves) -> usize {
        let same = |slot: &Slot| slots[row.slot].past.iter().zip(&slot.past).take_while(|(a, b)| a == b).count();
        let free = slots.iter().enumerate().filter(|(_, slot)| !slot.is_taken);
        // Of equals the first.
        let (start, to) =
            free.map(|(to, slot)| (same(slot), to)).rev().max_by_key(|(same, _)| *same).expect("there is a slot for every row");
        let (from, end) = (row.slot, row.length);
        if start < end {
            moves.past.push(Move { from, to, start, end });
        }
        if slots[to].encoded != slots[from].encoded {
            moves.encoded.push(Move { from, to, start: 0, end: row.n_encoded });
        }
        slots[to] = Slot { is_taken: true, ..slots[from].clone() };
        to
    }

    fn taken(&mut self, row: usize) -> &mut bool {
        &mut self.slots[self.live[row].slot].is_taken
    }

    fn stamp(&mut self) -> u64 {
        self.n_stamps += 1;
        self.n_stamps
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::Random;

    /// Slots as a graph and its copies leave them: what stands at each position, and what was encoded.
    #[derive(Default)]
    struct Memory {
        past: Vec<Vec<u64>>,
        encoded: Vec<u64>,
    }

    const NOISE: u64 = u64::MAX;

    impl Memory {
        /// As new lanes are filled: what live rows hold goes to the first slots.
        fn resize(&mut self, rows: &mut Rows, n_slots: usize) {
            let old: Vec<usize> = rows.live().iter().map(|row| row.slot).collect();
            rows.resize(n_slots);
            let past = old.iter().map(|slot| self.past[*slot].clone());
            self.past = past.chain(std::iter::repeat_with(|| vec![NOISE; 64])).take(n_slots).collect();
            let encoded = old.iter().map(|slot| self.encoded[*slot]);
            self.encoded = encoded.chain(std::iter::repeat(NOISE)).take(n_slots).collect();
        }

        fn copy(&mut self, moves: &Moves, n_copied: &mut usize) {
            for all in [&moves.past, &moves.encoded] {
                assert!(all.iter().all(|step| all.iter().all(|other| step.from != other.to)), "a slot is read and written");
            }
            for Move { from, to, start, end } in moves.past.iter().copied() {
                let moved = self.past[from][start..end].to_vec();
                self.past[to][start..end].copy_from_slice(&moved);
                *n_copied += end - start;
            }
            moves.encoded.iter().for_each(|step| self.encoded[step.to] = self.encoded[step.from]);
        }
    }

    fn below(random: &mut Random, n: usize) -> usize {
        (random.uniform() * n as f64) as usize
    }

    /// What each live row is to find in its slot.
    type Wanted = Vec<(Vec<u64>, u64)>;

    fn open(rows: &mut Rows, memory: &mut Memory, wanted: &mut Wanted, random: &mut Random) {
        let past: Vec<u64> = (0..1 + below(random, 9)).map(|_| random.bits() >> 1).collect();
        let encoded = random.bits() >> 1;
        let row = rows.open(Row { slot: 0, length: past.len(), offset: 0, n_encoded: 3 });
        memory.past[row.slot][..past.len()].copy_from_slice(&past);
        memory.encoded[row.slot] = encoded;
        wanted.push((past, encoded));
    }

    fn step(rows: &mut Rows, memory: &mut Memory, wanted: &mut Wanted, parents: &[usize], random: &mut Random) -> usize {
        let mut n_copied = 0;
        memory.copy(&rows.fork(parents), &mut n_copied);
        *wanted = parents.iter().map(|parent| wanted[*parent].clone()).collect();
        rows.advance();
        for slot in 0..memory.past.len() {
            match rows.live().iter().position(|row| row.slot == slot) {
                Some(row) => {
                    let new = random.bits() >> 1;
                    memory.past[slot][rows.live()[row].length - 1] = new;
                    wanted[row].0.push(new);
                }
                None => memory.past[slot][0] = NOISE,
            }
        }
        for (row, (past, encoded)) in rows.live().iter().zip(&*wanted) {
            assert_eq!((&memory.past[row.slot][..row.length], memory.encoded[row.slot]), (past.as_slice(), *encoded));
        }
        n_copied
    }

    #[test]
    fn every_row_finds_its_own_past_whatever_forks_comes_and_goes() {
        for seed in 0..300 {
            let (mut random, mut rows, mut memory, mut wanted) =
                (Random::new(seed), Rows::default(), Memory::default(), Wanted::new());
            for _ in 0..40 {
                for _ in 0..below(&mut random, 3) {
                    // More slots than before, or fewer.
                    let n_slots = rows.live().len() + 1 + below(&mut random, 3);
                    memory.resize(&mut rows, n_slots);
                    open(&mut rows, &mut memory, &mut wanted, &mut random);
                }
                if below(&mut random, 4) == 0 {
                    let kept: Vec<usize> = (0..wanted.len()).filter(|_| below(&mut random, 3) > 0).collect();
                    rows.keep(&kept);
                    wanted = kept.iter().map(|row| wanted[*row].clone()).collect();
                }
                if wanted.is_empty() {
                    continue;
                }
                let n_rows = 1 + below(&mut random, rows.n_slots());
                let short: Vec<usize> = (0..wanted.len()).filter(|row| wanted[*row].0.len() < 60).collect();
                let parents: Vec<usize> =
                    (0..n_rows).filter_map(|_| short.get(below(&mut random, short.len().max(1))).copied()).collect();
                step(&mut rows, &mut memory, &mut wanted, &parents, &mut random);
            }
        }
    }

    #[test]
    fn beams_copy_their_prefix_once_and_then_only_what_differs() {
        let (mut random, mut rows, mut memory, mut wanted) = (Random::new(3), Rows::new(5), Memory::default(), Wanted::new());
        memory.resize(&mut rows, 5);
        open(&mut rows, &mut memory, &mut wanted, &mut random);
        let length = wanted[0].0.len();
        let mut step = |parents: &[usize]| step(&mut rows, &mut memory, &mut wanted, parents, &mut random);
        assert_eq!(step(&[0; 5]), 4 * length);
        assert_eq!(step(&[0, 1, 2, 3, 4]), 0);
        assert_eq!(step(&[4, 2, 0, 1, 3]), 0, "rows that change places stay in their slots");
        assert_eq!(step(&[0, 0, 1, 2, 3]), 3, "what was written behind the prefix");
        assert_eq!(step(&[0, 1, 2, 3, 4]), 0);
        assert_eq!(step(&[0, 0, 2, 3, 4]), 2, "of two that parted two steps ago, two positions");
    }

    #[test]
    fn slots_of_rows_that_are_gone_are_free_at_once() {
        let mut rows = Rows::new(2);
        let row = Row { slot: 0, length: 3, offset: 0, n_encoded: 1 };
        assert_eq!([rows.open(row).slot, rows.open(row).slot], [0, 1]);
        rows.keep(&[1]);
        assert_eq!(rows.open(row).slot, 0);
        assert_eq!(rows.live().iter().map(|row| row.slot).collect::<Vec<_>>(), [1, 0]);
    }
}

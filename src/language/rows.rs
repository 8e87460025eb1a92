//! Which row lies in which slot of the cache, and what is copied when rows fork. Pure: no tensors.
//!
//! Slots stay where they are. The first continuation of a row stays in its slot; others get free slots, and only those positions are
//! copied that differ from what stands there already: rows of one request share their prefix, and mostly more.

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

/// Positions `start..end` on their way from one slot to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// Slot they come from.
    pub from: usize,
    /// Slot they go to.
    pub to: usize,
    /// First position.
    pub start: usize,
    /// Behind the last position.
    pub end: usize,
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

    /// Adds free slots.
    pub fn grow(&mut self, n_slots: usize) {
        self.slots.resize_with(n_slots.max(self.slots.len()), Slot::default);
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

    /// Frees every slot.
    pub fn clear(&mut self) {
        self.live.clear();
        self.slots.iter_mut().for_each(|slot| slot.is_taken = false);
    }

    /// The slot that needs the fewest copies to hold what `row` holds.
    fn follow(slots: &mut [Slot], row: Row, moves: &mut Moves) -> usize {
        let same = |slot: &Slot| slots[row.slot].past.iter().zip(&slot.past).take_while(|(a, b)| a == b).count();
        let free = slots.iter().enumerate().filter(|(_, slot)| !slot.is_taken);
        // Of equals the first.
        let (start, to) = free.map(|(to, slot)| (same(slot), to)).rev().max_by_key(|(same, _)| *same).expect("there is a slot for every row");
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

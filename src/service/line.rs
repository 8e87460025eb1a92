//! Who is next: a bounded line that owners share fairly.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::Error;

/// A line for jobs of several owners. Those of the highest priority are taken first; among them owners have their turns one after another,
/// each with its oldest job.
pub(super) struct Line<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    capacity: usize,
}

struct State<T> {
    /// By priority.
    classes: BTreeMap<i8, Class<T>>,
    n: usize,
    is_closed: bool,
}

/// Owners that have jobs, the next one first.
struct Class<T> {
    turns: VecDeque<u64>,
    jobs: HashMap<u64, VecDeque<T>>,
}

impl<T> Line<T> {
    /// One that is empty.
    pub fn new(capacity: usize) -> Self {
        let state = State { classes: BTreeMap::new(), n: 0, is_closed: false };
        Self { state: Mutex::new(state), changed: Condvar::new(), capacity }
    }

    /// Puts a job at its place; an error if the line is full.
    pub fn join(&self, owner: u64, priority: i8, job: T) -> Result<(), Error> {
        let mut state = self.state();
        if state.n >= self.capacity {
            return Err(Error::Overloaded);
        }
        state.classes.entry(priority).or_insert_with(Class::new).push(owner, job);
        state.n += 1;
        self.changed.notify_one();
        Ok(())
    }

    /// Waits for the next job; none once the line is closed and empty.
    pub fn next(&self) -> Option<T> {
        let mut state = self.state();
        loop {
            if let Some(job) = state.pop() {
                return Some(job);
            }
            if state.is_closed {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets in no more waiting: whoever waits for a job gets what is left, and then none.
    pub fn close(&self) {
        self.state().is_closed = true;
        self.changed.notify_all();
    }

    /// How many are in line.
    pub fn len(&self) -> usize {
        self.state().n
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> State<T> {
    fn pop(&mut self) -> Option<T> {
        let mut highest = self.classes.last_entry()?;
        let job = highest.get_mut().pop();
        if highest.get().turns.is_empty() {
            highest.remove();
        }
        self.n -= 1;
        Some(job)
    }
}

impl<T> Class<T> {
    fn new() -> Self {
        Self { turns: VecDeque::new(), jobs: HashMap::new() }
    }

    fn push(&mut self, owner: u64, job: T) {
        let jobs = self.jobs.entry(owner).or_default();
        if jobs.is_empty() {
            self.turns.push_back(owner);
        }
        jobs.push_back(job);
    }

    /// # Panics
    /// If it is empty; such a class is not kept.
    fn pop(&mut self) -> T {
        let owner = self.turns.pop_front().expect("an empty class is not kept");
        let jobs = self.jobs.get_mut(&owner).expect("who has a turn has a job");
        let job = jobs.pop_front().expect("who has a turn has a job");
        if jobs.is_empty() {
            self.jobs.remove(&owner);
        } else {
            self.turns.push_back(owner);
        }
        job
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(joins: &[(u64, i8, &'static str)]) -> Vec<&'static str> {
        let line = Line::new(100);
        joins.iter().for_each(|(owner, priority, job)| line.join(*owner, *priority, *job).unwrap());
        line.close();
        std::iter::from_fn(|| line.next()).collect()
    }

    #[test]
    fn owners_have_their_turns_and_each_its_own_order() {
        let joins = [(1, 0, "a1"), (1, 0, "a2"), (1, 0, "a3"), (2, 0, "b1"), (3, 0, "c1"), (2, 0, "b2")];
        assert_eq!(order(&joins), ["a1", "b1", "c1", "a2", "b2", "a3"]);
    }

    #[test]
    fn a_higher_priority_comes_first() {
        assert_eq!(order(&[(1, 0, "a"), (1, -1, "late"), (2, 5, "soon"), (1, 0, "b")]), ["soon", "a", "b", "late"]);
    }

    #[test]
    fn a_full_line_refuses_and_one_that_moved_on_does_not() {
        let line = Line::new(2);
        assert!(line.join(1, 0, 1).is_ok() && line.join(2, 9, 2).is_ok());
        assert!(matches!(line.join(1, 9, 3), Err(Error::Overloaded)));
        assert_eq!((line.next(), line.len()), (Some(2), 1));
        assert!(line.join(1, 0, 3).is_ok());
    }

    #[test]
    fn who_waits_is_woken_by_a_job_and_by_the_end() {
        let line = std::sync::Arc::new(Line::new(2));
        let waits = std::thread::spawn({
            let line = line.clone();
            move || std::iter::from_fn(|| line.next()).collect::<Vec<u8>>()
        });
        line.join(1, 0, 7).unwrap();
        line.close();
        assert_eq!(waits.join().unwrap(), [7]);
    }
}

//! All live requests, one step at a time.

use super::{Finish, Hypothesis, Model, Pick, Scores, Search, TokenId};

/// Names a request for as long as its loop lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(u64);

/// What a step did for one request.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// The request.
    pub id: RequestId,
    /// Tokens that became settled in this step.
    pub tokens: Vec<TokenId>,
    /// Set in the request's last event.
    pub finish: Option<Finish>,
    /// In the last event of a search that weighs several texts: all of them, the best first.
    pub hypotheses: Vec<Hypothesis>,
}

struct Live {
    id: RequestId,
    search: Box<dyn Search + Send>,
    n_rows: usize,
    n_reported: usize,
    /// Left by its owner: its rows die with the next step.
    gone: bool,
}

/// Drives every live request over one model.
pub struct StepLoop<M: Model> {
    model: M,
    waiting: Vec<(M::Prompt, Live)>,
    live: Vec<Live>,
    scores: Vec<f32>,
    picks: Vec<Pick>,
    next_id: u64,
}

impl<M: Model> StepLoop<M> {
    /// A loop without requests.
    pub fn new(model: M) -> Self {
        Self { model, waiting: Vec::new(), live: Vec::new(), scores: Vec::new(), picks: Vec::new(), next_id: 0 }
    }

    /// The model under the loop.
    pub fn model(&mut self) -> &mut M {
        &mut self.model
    }

    /// Puts a request in line; [`admit`](Self::admit) takes it in.
    pub fn join(&mut self, prompt: M::Prompt, search: Box<dyn Search + Send>) -> RequestId {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        self.waiting.push((prompt, Live { id, search, n_rows: 1, n_reported: 0, gone: false }));
        id
    }

    /// Drops a request; the others do not notice. Unknown and finished requests are ignored.
    pub fn leave(&mut self, id: RequestId) {
        self.waiting.retain(|(_, live)| live.id != id);
        for live in self.live.iter_mut().filter(|live| live.id == id) {
            live.gone = true;
        }
    }

    /// Whether nothing is live or waiting.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.live.iter().all(|live| live.gone)
    }

    /// Prefills the requests in line and makes them live.
    pub fn admit(&mut self) -> Result<(), M::Error> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let (prompts, live): (Vec<_>, Vec<_>) = self.waiting.drain(..).unzip();
        let done = self.model.prefill(&prompts, &mut self.scores);
        self.or_clear(done)?;
        self.live.extend(live);
        Ok(())
    }

    /// One step of every live request. After an error no request is live any more.
    pub fn step(&mut self) -> Result<Vec<Event>, M::Error> {
        let events = self.advance();
        self.live.retain(|live| !live.gone && live.search.finish().is_none());
        if self.picks.is_empty() {
            self.scores.clear();
            self.model.clear();
            return Ok(events);
        }
        let done = self.model.step(&self.picks, &mut self.scores);
        self.or_clear(done)?;
        Ok(events)
    }

    fn advance(&mut self) -> Vec<Event> {
        let scores = Scores::new(&self.scores, self.model.vocabulary());
        self.picks.clear();
        let mut row = 0;
        let mut events = Vec::with_capacity(self.live.len());
        for live in &mut self.live {
            let first = self.picks.len();
            if live.gone {
                row += live.n_rows;
                continue;
            }
            live.search.advance(scores.rows(row, live.n_rows), &mut self.picks);
            for pick in &mut self.picks[first..] {
                pick.parent += row;
            }
            row += live.n_rows;
            live.n_rows = self.picks.len() - first;
            let settled = live.search.settled();
            let finish = live.search.finish();
            let hypotheses = if finish.is_some() { live.search.hypotheses().to_vec() } else { Vec::new() };
            events.push(Event { id: live.id, tokens: settled[live.n_reported..].to_vec(), finish, hypotheses });
            live.n_reported = settled.len();
        }
        events
    }

    fn or_clear<T>(&mut self, done: Result<T, M::Error>) -> Result<T, M::Error> {
        if done.is_err() {
            self.live.clear();
            self.scores.clear();
            self.model.clear();
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Ends, Greedy, GreedyOptions};
    use super::*;

    /// Writes its prompt backwards, then the end token 0. A row is the text that is still to come.
    #[derive(Default)]
    struct Backwards {
        rows: Vec<Vec<TokenId>>,
        largest: usize,
        broken: bool,
    }

    const VOCABULARY: usize = 10;

    impl Backwards {
        fn score(row: &[TokenId], scores: &mut Vec<f32>) {
            let next = row.last().copied().unwrap_or(0) as usize;
            scores.extend((0..VOCABULARY).map(|token| if token == next { 1.0 } else { 0.0 }));
        }
    }

    impl Model for Backwards {
        type Prompt = Vec<TokenId>;
        type Error = &'static str;

        fn vocabulary(&self) -> usize {
            VOCABULARY
        }

        fn prefill(&mut self, prompts: &[Vec<TokenId>], scores: &mut Vec<f32>) -> Result<(), &'static str> {
            for prompt in prompts {
                Self::score(prompt, scores);
                self.rows.push(prompt.clone());
            }
            Ok(())
        }

        fn step(&mut self, picks: &[Pick], scores: &mut Vec<f32>) -> Result<(), &'static str> {
            if self.broken {
                return Err("broken");
            }
            let old = std::mem::take(&mut self.rows);
            scores.clear();
            for pick in picks {
                let mut row = old[pick.parent].clone();
                assert_eq!(row.pop().unwrap_or(0), pick.token, "the pick continues another row");
                Self::score(&row, scores);
                self.rows.push(row);
            }
            self.largest = self.largest.max(picks.len());
            Ok(())
        }

        fn clear(&mut self) {
            self.rows.clear();
        }
    }

    fn greedy(max_new_tokens: usize) -> Box<dyn Search + Send> {
        Box::new(Greedy::new(
            &[],
            GreedyOptions { ends: Ends { max_new_tokens, end: vec![0], stop: None }, ..GreedyOptions::default() },
        ))
    }

    fn drain(all: &mut StepLoop<Backwards>, found: &mut Vec<(RequestId, Vec<TokenId>, Option<Finish>)>) {
        while !all.is_idle() {
            all.admit().unwrap();
            collect(all.step().unwrap(), found);
        }
    }

    fn collect(events: Vec<Event>, found: &mut Vec<(RequestId, Vec<TokenId>, Option<Finish>)>) {
        for event in events {
            match found.iter_mut().find(|(id, ..)| *id == event.id) {
                Some((_, tokens, finish)) => {
                    tokens.extend(event.tokens);
                    *finish = event.finish;
                }
                None => found.push((event.id, event.tokens, event.finish)),
            }
        }
    }

    #[test]
    fn every_request_gets_its_own_tokens_beside_others() {
        let mut all = StepLoop::new(Backwards::default());
        let prompts = [vec![3], vec![1, 2, 3, 4], vec![], vec![5, 6]];
        let ids: Vec<_> = prompts.iter().map(|p| all.join(p.clone(), greedy(9))).collect();
        let mut found = Vec::new();
        drain(&mut all, &mut found);
        for (id, prompt) in ids.iter().zip(&prompts) {
            let mut expected: Vec<TokenId> = prompt.iter().rev().copied().collect();
            expected.push(0);
            let (_, tokens, finish) = found.iter().find(|(found, ..)| found == id).unwrap();
            assert_eq!((tokens, finish), (&expected, &Some(Finish::Stop)));
        }
        assert_eq!(all.model().largest, 3, "rows of finished requests stay in the model");
        assert!(all.model().rows.is_empty());
    }

    #[test]
    fn requests_join_and_leave_between_steps() {
        let mut all = StepLoop::new(Backwards::default());
        let first = all.join(vec![1, 2, 3, 4], greedy(9));
        let dropped = all.join(vec![9, 9, 9, 9, 9, 9], greedy(9));
        let mut found = Vec::new();
        all.admit().unwrap();
        collect(all.step().unwrap(), &mut found);
        let late = all.join(vec![7, 8], greedy(9));
        let never = all.join(vec![6], greedy(9));
        all.leave(dropped);
        all.leave(never);
        drain(&mut all, &mut found);
        let of = |id| found.iter().find(|(found, ..)| *found == id).map(|(_, tokens, _)| tokens.clone());
        assert_eq!(of(first), Some(vec![4, 3, 2, 1, 0]));
        assert_eq!(of(late), Some(vec![8, 7, 0]));
        assert_eq!(of(dropped), Some(vec![9]));
        assert_eq!(of(never), None);
    }

    #[test]
    fn a_limit_ends_a_request_with_length() {
        let mut all = StepLoop::new(Backwards::default());
        all.join(vec![1, 2, 3], greedy(2));
        let mut found = Vec::new();
        drain(&mut all, &mut found);
        assert_eq!(found[0].1, [3, 2]);
        assert_eq!(found[0].2, Some(Finish::Length));
    }

    #[test]
    fn an_error_leaves_an_idle_loop_that_works_again() {
        let mut all = StepLoop::new(Backwards::default());
        all.join(vec![1, 2, 3], greedy(9));
        all.admit().unwrap();
        all.model().broken = true;
        assert_eq!(all.step(), Err("broken"));
        assert!(all.is_idle());
        all.model().broken = false;
        all.join(vec![4], greedy(9));
        let mut found = Vec::new();
        drain(&mut all, &mut found);
        assert_eq!(found[0].1, [4, 0]);
    }
}

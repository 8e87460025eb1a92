//! All live requests, one run of the model at a time.

use std::collections::VecDeque;

use crate::bundle::READ_AT_ONCE;

use super::{Finish, Hypothesis, LogProb, Model, Pick, Room, Search, TokenId};

/// Names a request for as long as its loop lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(u64);

impl std::fmt::Display for RequestId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// What a step did for one request.
#[derive(Clone, Debug, PartialEq)]
pub struct Event<E> {
    /// The request.
    pub id: RequestId,
    /// Whether its prompt was read in this step.
    pub is_first: bool,
    /// Tokens that became settled in this step.
    pub tokens: Vec<TokenId>,
    /// How probable they are, where that was asked for.
    pub log_probs: Vec<LogProb>,
    /// Set in the request's last event: how it ended, or why it failed.
    pub end: Option<Result<Ended, E>>,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    /// Why.
    pub finish: Finish,
    /// All texts of a search that writes several.
    pub hypotheses: Vec<Hypothesis>,
}

struct Request {
    id: RequestId,
    search: Box<dyn Search + Send>,
    room: Room,
    /// Its rows among those of the model.
    first_row: usize,
    n_rows: usize,
    /// What it goes on with; parents count within its rows.
    picks: Vec<Pick>,
    n_reported: usize,
    has_begun: bool,
}

/// Drives every live request over one model.
pub struct StepLoop<M: Model> {
    model: M,
    waiting: VecDeque<(M::Prompt, Request)>,
    live: Vec<Request>,
    picks: Vec<Pick>,
    /// Rows that the model keeps, those of requests that are gone included.
    n_rows: usize,
    next_id: u64,
    /// Whether the last run read prompts: live texts go on before more are read.
    has_read: bool,
}

impl<M: Model> StepLoop<M> {
    /// A loop without requests.
    pub fn new(model: M) -> Self {
        Self { model, waiting: VecDeque::new(), live: Vec::new(), picks: Vec::new(), n_rows: 0, next_id: 0, has_read: false }
    }

    /// The model under the loop. Its rows belong to the live requests.
    pub fn model(&mut self) -> &mut M {
        &mut self.model
    }

    /// The model, with the rows of whatever was live.
    pub fn into_model(self) -> M {
        self.model
    }

    /// Puts a request in line that comes to `n_rows` rows at most. It is taken in, in the order of coming, once there is room.
    pub fn join(&mut self, prompt: M::Prompt, search: Box<dyn Search + Send>, n_rows: usize) -> RequestId {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let room = Room { rows: n_rows.max(1), ..self.model.room(&prompt) };
        let request = Request { id, search, room, first_row: 0, n_rows: 1, picks: Vec::new(), n_reported: 0, has_begun: false };
        self.waiting.push_back((prompt, request));
        id
    }

    /// Drops a request; the others do not notice. False if there is none of this name, or no more.
    pub fn leave(&mut self, id: RequestId) -> bool {
        let before = self.waiting.len() + self.live.len();
        self.waiting.retain(|(_, request)| request.id != id);
        self.live.retain(|request| request.id != id);
        self.free_if_idle();
        self.waiting.len() + self.live.len() < before
    }

    /// Whether nothing is live or waiting.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.live.is_empty()
    }

    /// Requests that are in line.
    pub fn n_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Requests that are being written.
    pub fn n_live(&self) -> usize {
        self.live.len()
    }

    /// One run of the model: over the live rows, or over prompts in line, turn by turn. What it settles is handed out at once.
    pub fn step(&mut self) -> Vec<Event<M::Error>> {
        let mut events = Vec::new();
        let has_read = std::mem::take(&mut self.has_read);
        if !has_read || self.live.is_empty() {
            self.has_read = self.admit(&mut events);
        }
        if !self.has_read && self.run(&mut events) {
            self.advance(0, &mut events);
        }
        events
    }

    /// Runs the model over all picks.
    fn run(&mut self, events: &mut Vec<Event<M::Error>>) -> bool {
        self.picks.clear();
        for request in &mut self.live {
            let first = self.picks.len();
            let picks = request.picks.drain(..);
            self.picks.extend(picks.map(|pick| Pick { parent: pick.parent + request.first_row, ..pick }));
            (request.first_row, request.n_rows) = (first, self.picks.len() - first);
        }
        if self.picks.is_empty() {
            return false;
        }
        self.n_rows = self.picks.len();
        let Err(error) = self.model.step(&self.picks) else { return true };
        events.extend(self.live.drain(..).map(|request| failed(request.id, error.clone())));
        self.free_if_idle();
        false
    }

    /// Reads the prompts of those in line for whom there is room; false if there are none.
    fn admit(&mut self, events: &mut Vec<Event<M::Error>>) -> bool {
        if self.waiting.is_empty() {
            return false;
        }
        self.forget_the_gone();
        let (prompts, requests) = self.take_in(events);
        let has_read = !requests.is_empty();
        self.read(prompts, requests, events);
        has_read
    }

    fn read(&mut self, prompts: Vec<M::Prompt>, requests: Vec<Request>, events: &mut Vec<Event<M::Error>>) {
        if prompts.is_empty() {
            return;
        }
        match self.model.prefill(&prompts) {
            Ok(()) => {
                let first = self.live.len();
                requests.into_iter().for_each(|request| self.enter(request));
                self.advance(first, events);
            }
            // One of several is at fault, perhaps: each gets a run of its own.
            Err(_) if prompts.len() > 1 => {
                for (prompt, request) in prompts.into_iter().zip(requests) {
                    self.read(vec![prompt], vec![request], events);
                }
            }
            Err(error) => events.extend(requests.iter().map(|request| failed(request.id, error.clone()))),
        }
    }

    fn enter(&mut self, mut request: Request) {
        request.first_row = self.n_rows;
        self.n_rows += 1;
        self.live.push(request);
    }

    /// The first of those in line, as many as there is room for.
    fn take_in(&mut self, events: &mut Vec<Event<M::Error>>) -> (Vec<M::Prompt>, Vec<Request>) {
        let (mut prompts, mut requests) = (Vec::new(), Vec::new());
        let mut room = self.live.iter().fold(Room::default(), |room, request| room.beside(request.room));
        let all = self.waiting.iter().fold(room, |room, (_, request)| room.beside(request.room));
        // Slots made for all at once are filled with zeros once; those for one more again and again.
        let has_all = !self.waiting.is_empty() && matches!(self.model.reserve(all), Ok(true));
        let mut n_read = 0;
        while let Some((prompt, request)) = self.waiting.pop_front() {
            let wanted = room.beside(request.room);
            n_read += request.room.read;
            if !requests.is_empty() && n_read > READ_AT_ONCE {
                self.waiting.push_front((prompt, request));
                break;
            }
            match if has_all { Ok(true) } else { self.model.reserve(wanted) } {
                Ok(true) => {
                    room = wanted;
                    prompts.push(prompt);
                    requests.push(request);
                }
                Ok(false) if room.rows > 0 => {
                    self.waiting.push_front((prompt, request));
                    break;
                }
                Ok(false) => events.push(failed(request.id, self.model.no_room(wanted))),
                Err(error) => events.push(failed(request.id, error)),
            }
        }
        (prompts, requests)
    }

    /// Shows the scores of the last run to the searches of the requests from `first` on.
    fn advance(&mut self, first: usize, events: &mut Vec<Event<M::Error>>) {
        for request in &mut self.live[first..] {
            match self.model.scores(request.first_row..request.first_row + request.n_rows) {
                Ok(scores) => request.search.advance(scores, &mut request.picks),
                Err(error) => {
                    events.push(failed(request.id, error));
                    continue;
                }
            }
            events.extend(request.report());
        }
        let is_over = |id| events.iter().any(|event| event.id == id && event.end.is_some());
        self.live.retain(|request| !is_over(request.id));
        self.free_if_idle();
    }

    /// Behind the last request no step comes that would free its rows.
    fn free_if_idle(&mut self) {
        if self.live.is_empty() {
            self.forget_the_gone();
        }
    }

    /// Frees the rows of requests that have ended or left.
    fn forget_the_gone(&mut self) {
        if self.live.iter().map(|request| request.n_rows).sum::<usize>() == self.n_rows {
            return;
        }
        let kept: Vec<usize> = self.live.iter().flat_map(|r| r.first_row..r.first_row + r.n_rows).collect();
        self.n_rows = 0;
        for request in &mut self.live {
            request.first_row = self.n_rows;
            self.n_rows += request.n_rows;
        }
        self.model.keep(&kept);
    }
}

impl Request {
    /// What is new, if anything.
    fn report<E>(&mut self) -> Option<Event<E>> {
        let (settled, log_probs) = (self.search.settled(), self.search.log_probs());
        let new = self.n_reported..settled.len();
        let hypotheses = || self.search.hypotheses().to_vec();
        let end = self.search.finish().map(|finish| Ok(Ended { finish, hypotheses: hypotheses() }));
        self.n_reported = settled.len();
        let log_probs = log_probs.get(new.clone()).unwrap_or_default().to_vec();
        let is_first = !std::mem::replace(&mut self.has_begun, true);
        let event = Event { id: self.id, is_first, tokens: settled[new].to_vec(), log_probs, end };
        (is_first || event.end.is_some() || !event.tokens.is_empty()).then_some(event)
    }
}

fn failed<E>(id: RequestId, error: E) -> Event<E> {
    Event { id, is_first: false, tokens: Vec::new(), log_probs: Vec::new(), end: Some(Err(error)) }
}

#[cfg(test)]
mod tests {
    use super::super::{Ends, Greedy, GreedyOptions, Scores};
    use super::*;

    /// Writes its prompt backwards, then the end token 0. A row is the text that is still to come.
    struct Backwards {
        rows: Vec<Vec<TokenId>>,
        scores: Vec<f32>,
        /// The first row that the last run computed.
        first: usize,
        n_runs: usize,
        broken: bool,
        /// Rows that there are.
        room: usize,
    }

    const VOCABULARY: usize = 10;
    /// Prompts with this token cannot be read; rows that come to it have no numbers.
    const UNREADABLE: TokenId = 9;
    const NAN: TokenId = 8;

    impl Backwards {
        fn with_room(room: usize) -> StepLoop<Self> {
            StepLoop::new(Self { rows: Vec::new(), scores: Vec::new(), first: 0, n_runs: 0, broken: false, room })
        }

        fn score(&mut self, first: usize) {
            self.first = first;
            self.scores.clear();
            for row in &self.rows[first..] {
                let next = row.last().copied().unwrap_or(0);
                let score = |token| if next == NAN { f32::NAN } else { f32::from(token == next) };
                self.scores.extend((0..VOCABULARY as TokenId).map(score));
            }
        }
    }

    impl Model for Backwards {
        type Prompt = Vec<TokenId>;
        type Error = &'static str;

        fn room(&self, prompt: &Vec<TokenId>) -> Room {
            Room { rows: 1, positions: prompt.len(), read: prompt.len() }
        }

        fn reserve(&mut self, room: Room) -> Result<bool, &'static str> {
            Ok(room.rows <= self.room)
        }

        fn no_room(&self, _: Room) -> &'static str {
            "no room"
        }

        fn prefill(&mut self, prompts: &[Vec<TokenId>]) -> Result<(), &'static str> {
            self.n_runs += 1;
            if prompts.iter().flatten().any(|token| *token == UNREADABLE) {
                return Err("unreadable");
            }
            let first = self.rows.len();
            self.rows.extend_from_slice(prompts);
            self.score(first);
            Ok(())
        }

        fn step(&mut self, picks: &[Pick]) -> Result<(), &'static str> {
            self.n_runs += 1;
            if self.broken {
                return Err("broken");
            }
            let old = std::mem::take(&mut self.rows);
            for pick in picks {
                let mut row = old[pick.parent].clone();
                assert_eq!(row.pop().unwrap_or(0), pick.token, "the pick continues another row");
                self.rows.push(row);
            }
            self.score(0);
            Ok(())
        }

        fn scores(&self, rows: std::ops::Range<usize>) -> Result<Scores<'_>, &'static str> {
            let scores = &self.scores[(rows.start - self.first) * VOCABULARY..(rows.end - self.first) * VOCABULARY];
            if scores.iter().any(|score| score.is_nan()) { Err("not a number") } else { Ok(Scores::new(scores, VOCABULARY)) }
        }

        fn keep(&mut self, rows: &[usize]) {
            self.rows = rows.iter().map(|row| self.rows[*row].clone()).collect();
        }
    }

    fn greedy(max_new_tokens: usize) -> Box<dyn Search + Send> {
        let ends = Ends { max_new_tokens, end: vec![0], stop: None };
        Box::new(Greedy::new(&[], GreedyOptions { ends, ..GreedyOptions::default() }))
    }

    /// What each request wrote, and how it ended.
    #[derive(Default)]
    struct Found(Vec<(RequestId, Vec<TokenId>, End)>);

    type End = Option<Result<Finish, &'static str>>;

    impl Found {
        fn drain(&mut self, all: &mut StepLoop<Backwards>) {
            while !all.is_idle() {
                self.step(all);
            }
        }

        fn step(&mut self, all: &mut StepLoop<Backwards>) {
            let before = all.model().n_runs;
            for event in all.step() {
                let end = event.end.map(|end| end.map(|ended| ended.finish));
                match self.0.iter_mut().find(|(id, ..)| *id == event.id) {
                    Some((_, tokens, was)) => {
                        assert!(was.is_none(), "an event behind the last");
                        tokens.extend(event.tokens);
                        *was = end;
                    }
                    None => self.0.push((event.id, event.tokens, end)),
                }
            }
            assert!(all.model().n_runs <= before + 2, "what is settled waits for the next run");
        }

        fn of(&self, id: RequestId) -> Option<(&[TokenId], End)> {
            self.0.iter().find(|(found, ..)| *found == id).map(|(_, tokens, end)| (tokens.as_slice(), *end))
        }
    }

    const STOP: End = Some(Ok(Finish::Stop));

    #[test]
    fn every_request_gets_its_own_tokens_beside_others() {
        let mut all = Backwards::with_room(9);
        let prompts = [vec![3], vec![1, 2, 3, 4], vec![], vec![5, 6]];
        let ids: Vec<_> = prompts.iter().map(|p| all.join(p.clone(), greedy(9), 1)).collect();
        let mut found = Found::default();
        found.drain(&mut all);
        for (id, prompt) in ids.iter().zip(&prompts) {
            let expected: Vec<TokenId> = prompt.iter().rev().copied().chain([0]).collect();
            assert_eq!(found.of(*id), Some((expected.as_slice(), STOP)));
        }
        assert!(all.model().rows.is_empty());
    }

    #[test]
    fn the_first_token_comes_with_the_run_that_reads_the_prompt_and_every_other_with_its_own() {
        let mut all = Backwards::with_room(9);
        let id = all.join(vec![1, 2], greedy(9), 1);
        for (n_runs, tokens) in [(1, &[2][..]), (2, &[2, 1]), (3, &[2, 1, 0])] {
            let mut found = Found::default();
            found.step(&mut all);
            assert_eq!((all.model().n_runs, found.of(id).unwrap().0), (n_runs, &tokens[n_runs - 1..]));
        }
        assert!(all.is_idle() && all.step().is_empty());
    }

    #[test]
    fn requests_join_and_leave_between_steps() {
        let mut all = Backwards::with_room(9);
        let first = all.join(vec![1, 2, 3, 4], greedy(9), 1);
        let dropped = all.join(vec![7, 7, 7, 7, 7, 7], greedy(9), 1);
        let mut found = Found::default();
        found.step(&mut all);
        let (late, never) = (all.join(vec![7, 5], greedy(9), 1), all.join(vec![6], greedy(9), 1));
        assert!(all.leave(dropped) && all.leave(never) && !all.leave(dropped));
        found.drain(&mut all);
        assert_eq!(found.of(first), Some((&[4, 3, 2, 1, 0][..], STOP)));
        assert_eq!(found.of(late), Some((&[5, 7, 0][..], STOP)));
        assert_eq!(found.of(dropped), Some((&[7][..], None)));
        assert_eq!(found.of(never), None);
        assert!(!all.leave(first), "it has ended");

        let alone = all.join(vec![1, 2], greedy(9), 1);
        all.step();
        assert!(!all.model().rows.is_empty() && all.leave(alone));
        assert!(all.is_idle() && all.model().rows.is_empty(), "no step comes that would free its row");
    }

    #[test]
    fn requests_wait_for_room_in_the_order_of_coming() {
        let mut all = Backwards::with_room(3);
        let ids = [2, 2, 1, 4, 1].map(|n_rows| all.join(vec![1, 2], greedy(9), n_rows));
        let mut found = Found::default();
        found.step(&mut all);
        assert_eq!((all.n_live(), all.n_waiting()), (1, 4), "the second does not fit beside the first, and none overtakes it");
        found.drain(&mut all);
        for id in [0, 1, 2, 4] {
            assert_eq!(found.of(ids[id]), Some((&[2, 1, 0][..], STOP)));
        }
        assert_eq!(found.of(ids[3]), Some((&[][..], Some(Err("no room")))));
    }

    #[test]
    fn live_texts_go_on_while_others_are_read() {
        let mut all = Backwards::with_room(900);
        let mut found = Found::default();
        let first = all.join(vec![1; 40], greedy(99), 1);
        let long = |all: &mut StepLoop<Backwards>| all.join(vec![1; READ_AT_ONCE], greedy(1), 1);
        let others: Vec<_> = (0..5).map(|_| long(&mut all)).collect();
        for _ in 0..11 {
            found.step(&mut all);
        }
        assert_eq!(others.iter().filter(|id| found.of(**id).is_some()).count(), 5);
        assert_eq!(found.of(first).unwrap().0.len(), 6, "a token for every prompt that was read, and its first");
    }

    #[test]
    fn a_limit_ends_a_request_with_length() {
        let mut all = Backwards::with_room(1);
        let id = all.join(vec![1, 2, 3], greedy(2), 1);
        let mut found = Found::default();
        found.drain(&mut all);
        assert_eq!(found.of(id), Some((&[3, 2][..], Some(Ok(Finish::Length)))));
    }

    #[test]
    fn a_failed_run_fails_what_was_live_and_nothing_else() {
        let mut all = Backwards::with_room(2);
        let [done, live, waiting] = [vec![], vec![1, 2, 3], vec![4]].map(|prompt| all.join(prompt, greedy(9), 1));
        let mut found = Found::default();
        found.step(&mut all);
        all.model().broken = true;
        // The turn is with the live ones.
        found.step(&mut all);
        assert_eq!(found.of(done), Some((&[0][..], STOP)), "its end was handed out before the run that failed");
        assert_eq!(found.of(live), Some((&[3][..], Some(Err("broken")))));
        assert!(all.model().rows.is_empty());
        all.model().broken = false;
        found.drain(&mut all);
        assert_eq!(found.of(waiting), Some((&[4, 0][..], STOP)));
    }

    #[test]
    fn a_prompt_that_cannot_be_read_fails_alone() {
        let mut all = Backwards::with_room(9);
        let early = all.join(vec![1, 2, 3], greedy(9), 1);
        let mut found = Found::default();
        found.step(&mut all);
        let [good, bad, nan] = [vec![1, 2], vec![UNREADABLE], vec![1, NAN, 2]].map(|prompt| all.join(prompt, greedy(9), 1));
        while !all.is_idle() {
            for event in all.step() {
                let end = event.end.map(|end| end.map(|ended| ended.finish));
                found.0.push((event.id, event.tokens, end));
            }
        }
        let end = |id| found.0.iter().filter_map(|(found, _, end)| end.filter(|_| *found == id)).collect::<Vec<_>>();
        assert_eq!(end(early), [Ok(Finish::Stop)]);
        assert_eq!(end(good), [Ok(Finish::Stop)]);
        assert_eq!(end(bad), [Err("unreadable")]);
        assert_eq!(end(nan), [Err("not a number")]);
    }
}

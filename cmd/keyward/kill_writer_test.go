package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/manage"
)

// A killKey is what a writer knows of a key of its own.
type killKey struct {
	id             apikey.ID
	name           string
	secrets        []string // one a generation
	ended          []bool   // those that were ended
	disabled, gone bool     // gone: revoked
	fresh          bool     // it was changed since it was looked at last
}

// valid lists the generations that have not ended, the oldest first.
func (k *killKey) valid() (at []int) {
	for i, ended := range k.ended {
		if !ended {
			at = append(at, i)
		}
	}
	return at
}

// differs tells in what a record is not what the writer knows; "" if in nothing.
func (k *killKey) differs(r admin.KeyRecord) string {
	status := "active"
	switch {
	case k.gone:
		status = "revoked"
	case k.disabled:
		status = "disabled"
	}
	switch {
	case r.Status != status:
		return fmt.Sprintf("it is %s, want %s", r.Status, status)
	case r.Name != k.name:
		return fmt.Sprintf("its name is %s, want %s", r.Name, k.name)
	case r.Hint == "" || len(r.Generations) != len(k.ended):
		return fmt.Sprintf("it has %d generations, want %d", len(r.Generations), len(k.ended))
	}
	for i, g := range r.Generations {
		if !k.gone && g.Revoked != k.ended[i] {
			return fmt.Sprintf("generation %d is ended: %t, want %t", g.Number, g.Revoked, k.ended[i])
		}
	}
	return ""
}

// A killTenant is an instance of a writer's.
type killTenant struct {
	id       string
	exists   bool
	disabled bool
	userCap  int
	keys     []*killKey
	lost     []string // secrets of keys that went with the instance
}

func (i *killTenant) policy() admin.PolicyInput {
	return admin.PolicyInput{
		Disabled: i.disabled, Creation: admin.CreationInput{PerHour: new(-1)},
		Caps: admin.CapsInput{Instance: new(-1), User: &i.userCap},
	}
}

type killToken struct {
	id     apikey.ID
	name   string
	secret apikey.Secret // zero: its creation was never acknowledged
	gone   bool
}

// A mutation is one change that a writer makes. It is of the model only when do has returned without an
// error.
type mutation struct {
	what string
	// do makes the change and takes it into the model. It may be repeated: then nothing happens twice.
	do func(ctx context.Context) error
	// done tells, by what the server has, whether the change was made; an error if by half.
	done func(ctx context.Context) (bool, error)
	// adopt takes a change that was made, but not acknowledged, into the model, where it cannot be
	// repeated; nil elsewhere.
	adopt func()
	// events are what the audit has to say of it; some are known only when it was acknowledged.
	events []string
	// again: repeated, it is another event.
	again bool
}

// A killWriter changes instances, keys and tokens of its own, one after another. What it was told is what
// there has to be; of the one change that was not acknowledged all or nothing.
type killWriter struct {
	name    string
	client  *manage.Client
	manage  string // URL of the Management API
	holders string // URL of POST /revoke
	web     *http.Client
	random  *rand.Rand
	acked   func(what string) // counts

	home, spare killTenant
	tokens      []*killToken
	n           int   // names things
	order       []int // of the next changes
	pending     *mutation
	// replay repeats the last change with an Idempotency-Key, if what that made still works; nil before.
	replay func(ctx context.Context) error
	events map[string]int // acknowledged
}

func eventOf(action, instance, target string) string { return action + " " + instance + " " + target }

// run makes changes until one fails.
func (w *killWriter) run(ctx context.Context) error {
	for {
		if err := w.step(ctx, w.next()); err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
	}
}

// step makes one change.
func (w *killWriter) step(ctx context.Context, m *mutation) error {
	w.pending = m
	if err := m.do(ctx); err != nil {
		return fmt.Errorf("%s: %w", m.what, err)
	}
	w.pending = nil
	for _, e := range m.events {
		w.events[e]++
	}
	w.acked(m.what)
	return nil
}

// kinds is how many cases next has.
const kinds = 16

// next chooses a change that can be made now.
func (w *killWriter) next() *mutation {
	w.n++
	switch {
	case !w.home.exists:
		return w.put(&w.home)
	case w.home.disabled:
		return w.switchInstance()
	}
	var alive []*killKey
	for _, k := range w.home.keys {
		if !k.gone {
			alive = append(alive, k)
		}
	}
	if len(alive) < 3 {
		return w.create(&w.home)
	}
	k := alive[len(alive)-1-w.random.IntN(min(len(alive), 6))]
	// In turn, each in its own order, so that nothing is left out by chance.
	if w.n%kinds == 0 || w.order == nil {
		w.order = w.random.Perm(kinds)
	}
	switch w.order[w.n%kinds] {
	case 0:
		return w.create(&w.home)
	case 1:
		return w.change(k, "patch", "key.update", admin.KeyPatch{Name: admin.To(w.thing("renamed"))})
	case 2, 3, 4:
		return w.rotate(k)
	case 5, 6:
		return w.endGeneration(k)
	case 7:
		return w.revoke(k)
	case 8:
		return w.importAndRevokeKeys(alive)
	case 9, 10:
		action := "key.disable"
		if k.disabled {
			action = "key.enable"
		}
		return w.change(k, strings.TrimPrefix(action, "key."), action, admin.KeyPatch{Disabled: admin.To(!k.disabled)})
	case 11:
		return w.switchInstance()
	case 12:
		return w.put(&w.home)
	case 13:
		switch {
		case !w.spare.exists:
			return w.put(&w.spare)
		case len(w.spare.keys) < 2:
			return w.create(&w.spare)
		}
		return w.deleteSpare()
	case 14:
		if n := len(w.tokens); n > 0 && !w.tokens[n-1].gone {
			return w.revokeToken(w.tokens[n-1])
		}
		return w.createToken()
	default:
		if len(k.valid()) > 1 {
			return w.endGeneration(k)
		}
		return w.report(k)
	}
}

func (w *killWriter) thing(kind string) string { return fmt.Sprintf("%s-%s-%d", w.name, kind, w.n) }

func (w *killWriter) put(i *killTenant) *mutation {
	after := *i
	after.exists, after.userCap = true, 1+w.n
	return &mutation{
		what: "put instance", again: true, events: []string{eventOf("instance.put", i.id, i.id)},
		do: func(ctx context.Context) error {
			_, err := w.client.PutInstance(ctx, i.id, after.policy())
			if err == nil {
				i.exists, i.userCap = true, after.userCap
			}
			return err
		},
		done: func(ctx context.Context) (bool, error) {
			got, err := w.client.Instance(ctx, i.id)
			if missing(err) {
				return false, nil
			}
			return got.Policy.Caps.User == after.userCap, err
		},
	}
}

func missing(err error) bool {
	answer, ok := errors.AsType[*manage.Error](err)
	return ok && answer.Status == http.StatusNotFound
}

func (w *killWriter) switchInstance() *mutation {
	disabled := !w.home.disabled
	return &mutation{
		what: fmt.Sprintf("switch instance, disabled %t", disabled), events: []string{eventOf("instance.put", w.home.id, w.home.id)},
		do: func(ctx context.Context) error {
			_, err := w.client.SwitchInstance(ctx, w.home.id, disabled)
			if err == nil {
				w.home.disabled = disabled
			}
			return err
		},
		done: func(ctx context.Context) (bool, error) {
			got, err := w.client.Instance(ctx, w.home.id)
			return got.Policy.Disabled == disabled, err
		},
	}
}

func (w *killWriter) deleteSpare() *mutation {
	return &mutation{
		what: "delete instance", events: []string{eventOf("instance.delete", w.spare.id, w.spare.id)},
		do: func(ctx context.Context) error {
			if _, err := w.client.DeleteInstance(ctx, w.spare.id, true); err != nil && !missing(err) {
				return err
			}
			for _, k := range w.spare.keys {
				w.spare.lost = append(w.spare.lost, k.secrets...)
			}
			w.spare.exists, w.spare.keys = false, nil
			return nil
		},
		done: func(ctx context.Context) (bool, error) {
			_, err := w.client.Instance(ctx, w.spare.id)
			if missing(err) {
				return true, nil
			}
			return false, err
		},
	}
}

// named finds the one key with a name; nil if there is none.
func (w *killWriter) named(ctx context.Context, instance, name string) (found *admin.KeyRecord, err error) {
	for k, err := range w.client.FindKeys(ctx, instance, admin.KeyListInput{NamePrefix: name}) {
		switch {
		case err != nil:
			return nil, err
		case k.Name != name:
			continue
		case found != nil:
			return nil, fmt.Errorf("%s was made twice", name)
		}
		found = &k
	}
	return found, nil
}

// shown checks a secret against the one that an earlier answer showed, "" for none.
func shown(before, now string) error {
	if before != "" && before != now {
		return errors.New("it was acknowledged, and a second answer shows another secret")
	}
	return nil
}

func (w *killWriter) create(i *killTenant) *mutation {
	name := w.thing("key")
	k := &killKey{name: name, secrets: []string{""}, ended: []bool{false}}
	m := &mutation{what: "create"}
	ask := func(ctx context.Context) (manage.CreatedKey, error) {
		return w.client.CreateKey(manage.WithIdempotencyKey(ctx, name), i.id, admin.KeyInput{Name: name})
	}
	m.do = func(ctx context.Context) error {
		made, err := ask(ctx)
		if err != nil {
			return err
		}
		k.id, k.secrets[0], k.fresh = made.Key.ID, made.Secret.Reveal(), true
		i.keys = append(i.keys, k)
		m.events = []string{eventOf("key.create", i.id, k.id.String())}
		w.replay = func(ctx context.Context) error {
			if k.gone || k.ended[0] || !slices.Contains(i.keys, k) {
				return nil
			}
			again, err := ask(ctx)
			return cmp.Or(err, shown(k.secrets[0], again.Secret.Reveal()))
		}
		return nil
	}
	m.done = func(ctx context.Context) (bool, error) {
		found, err := w.named(ctx, i.id, name)
		if err != nil || found == nil {
			return false, err
		}
		if why := k.differs(*found); why != "" {
			return true, errors.New(why)
		}
		return true, nil
	}
	return m
}

// became is the done of a change of one key.
func (w *killWriter) became(before *killKey, after killKey) func(context.Context) (bool, error) {
	was := *before
	was.ended = slices.Clone(before.ended)
	return func(ctx context.Context) (bool, error) {
		got, err := w.client.Key(ctx, w.home.id, was.id)
		if err != nil {
			return false, err
		}
		if after.differs(got) == "" {
			return true, nil
		}
		if why := was.differs(got); why != "" {
			return false, fmt.Errorf("it is neither as before nor as after: %s, or %s", why, after.differs(got))
		}
		return false, nil
	}
}

// on is a change of one key.
func (w *killWriter) on(k *killKey, what, action string, after killKey, do func(ctx context.Context) error) *mutation {
	return &mutation{
		what: what, events: []string{eventOf(action, w.home.id, k.id.String())}, done: w.became(k, after),
		do: func(ctx context.Context) error {
			if err := do(ctx); err != nil {
				return err
			}
			after.secrets = append(k.secrets, after.secrets[len(k.secrets):]...)
			*k = after
			k.fresh = true
			return nil
		},
	}
}

func (w *killWriter) change(k *killKey, what, action string, patch admin.KeyPatch) *mutation {
	after := *k
	if patch.Name.Present {
		after.name = patch.Name.Value
	}
	if patch.Disabled.Present {
		after.disabled = patch.Disabled.Value
	}
	return w.on(k, what, action, after, func(ctx context.Context) error {
		_, err := w.client.UpdateKey(ctx, w.home.id, k.id, patch)
		return err
	})
}

func (w *killWriter) rotate(k *killKey) *mutation {
	if k.disabled {
		return w.change(k, "enable", "key.enable", admin.KeyPatch{Disabled: admin.To(false)})
	}
	after, once := *k, w.thing("rotation")
	after.ended = append(slices.Clone(k.ended), false)
	if valid := k.valid(); len(valid) > 1 {
		after.ended[valid[0]] = true
	}
	nth := len(k.secrets)
	after.secrets = append(slices.Clone(k.secrets), "")
	ask := func(ctx context.Context) (string, error) {
		made, err := w.client.RotateKey(manage.WithIdempotencyKey(ctx, once), w.home.id, k.id, admin.RotateInput{GracePeriod: "1h", EndOldest: true})
		return made.Secret.Reveal(), err
	}
	return w.on(k, "rotate", "key.rotate", after, func(ctx context.Context) (err error) {
		if after.secrets[nth], err = ask(ctx); err != nil {
			return err
		}
		w.replay = func(ctx context.Context) error {
			if k.gone || k.ended[nth] {
				return nil
			}
			again, err := ask(ctx)
			return cmp.Or(err, shown(k.secrets[nth], again))
		}
		return nil
	})
}

func (w *killWriter) endGeneration(k *killKey) *mutation {
	valid := k.valid()
	if len(valid) < 2 {
		return w.rotate(k)
	}
	after, at := *k, valid[w.random.IntN(2)]
	after.ended = slices.Clone(k.ended)
	after.ended[at] = true
	return w.on(k, "revoke generation", "key.revokeGeneration", after, func(ctx context.Context) error {
		_, err := w.client.RevokeGeneration(ctx, w.home.id, k.id, at+1)
		return err
	})
}

func (w *killWriter) revoke(k *killKey) *mutation {
	after := *k
	after.gone = true
	return w.on(k, "revoke", "key.revoke", after, func(ctx context.Context) error {
		_, err := w.client.RevokeKey(ctx, w.home.id, k.id, "other")
		return err
	})
}

// report tells the listener of the holders that the one valid secret of a key has leaked. Its answer
// promises nothing yet: the change is there when it can be seen.
func (w *killWriter) report(k *killKey) *mutation {
	after, secret := *k, k.secrets[k.valid()[0]]
	after.gone = true
	return w.on(k, "report", "key.leak", after, func(ctx context.Context) error {
		body, err := json.Marshal(map[string]string{"secret": secret})
		if err != nil {
			return err
		}
		resp, err := w.web.Post(w.holders, "application/json", bytes.NewReader(body))
		if err != nil {
			return err
		}
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusAccepted {
			return fmt.Errorf("got %s", resp.Status)
		}
		return eventually(func() error {
			got, err := w.client.Key(ctx, w.home.id, k.id)
			switch {
			case err != nil:
				return fatal{err}
			case got.Status != "revoked":
				return errors.New("it was reported, and works")
			}
			return nil
		})
	})
}

// importAndRevokeKeys imports three keys, or revokes such three at once.
func (w *killWriter) importAndRevokeKeys(alive []*killKey) *mutation {
	const imported = "-import-"
	for _, k := range alive {
		if batch, _, ok := strings.Cut(k.name, "+"); ok && strings.Contains(k.name, imported) {
			return w.revokeKeys(batch + "+")
		}
	}
	name := w.thing("import")
	var rows bytes.Buffer
	var keys []*killKey
	for n := range 3 {
		k := &killKey{name: fmt.Sprintf("%s+%d", name, n), secrets: []string{apikey.Format{}.New(apikey.KindInstance).Reveal()}, ended: []bool{false}}
		keys = append(keys, k)
		if err := json.NewEncoder(&rows).Encode(map[string]string{"name": k.name, "secret": k.secrets[0]}); err != nil {
			panic(err) // of two strings
		}
	}
	m := &mutation{what: "import"}
	m.do = func(ctx context.Context) error {
		for report, err := range w.client.ImportKeys(ctx, w.home.id, bytes.NewReader(rows.Bytes()), manage.ImportOptions{}) {
			if err != nil {
				return err
			}
			if !report.Done || len(report.Rows) != len(keys) {
				return fmt.Errorf("got %+v", report)
			}
			for i, row := range report.Rows {
				keys[i].id, keys[i].fresh = row.KeyID, true
				m.events = append(m.events, eventOf("key.import", w.home.id, row.KeyID.String()))
			}
		}
		w.home.keys = append(w.home.keys, keys...)
		return nil
	}
	m.done = func(ctx context.Context) (bool, error) {
		there := 0
		for _, k := range keys {
			found, err := w.named(ctx, w.home.id, k.name)
			if err != nil {
				return false, err
			}
			if found != nil {
				there++
			}
		}
		if there != 0 && there != len(keys) {
			return false, fmt.Errorf("%d keys of a batch of %d were imported", there, len(keys))
		}
		return there > 0, nil
	}
	return m
}

// revokeKeys revokes those whose names begin so.
func (w *killWriter) revokeKeys(prefix string) *mutation {
	filter := admin.KeyListInput{NamePrefix: prefix}
	var keys []*killKey
	m := &mutation{what: "bulk revoke"}
	for _, k := range w.home.keys {
		if strings.HasPrefix(k.name, prefix) && !k.gone {
			keys = append(keys, k)
			m.events = append(m.events, eventOf("key.revoke", w.home.id, k.id.String()))
		}
	}
	left := func(ctx context.Context) (n int, err error) {
		for k, err := range w.client.FindKeys(ctx, w.home.id, filter) {
			if err != nil {
				return 0, err
			}
			if k.Status != "revoked" {
				n++
			}
		}
		return n, nil
	}
	m.do = func(ctx context.Context) error {
		n, err := left(ctx)
		if err != nil {
			return err
		}
		if _, err := w.client.RevokeKeys(ctx, w.home.id, admin.BulkRevocation{Filter: filter, Count: &n}); err != nil {
			return err
		}
		for _, k := range keys {
			k.gone, k.fresh = true, true
		}
		return nil
	}
	m.done = func(ctx context.Context) (bool, error) {
		n, err := left(ctx)
		if err == nil && n != 0 && n != len(keys) {
			err = fmt.Errorf("%d of %d keys, fewer than a batch, are left", n, len(keys))
		}
		return n == 0, err
	}
	return m
}

func (w *killWriter) createToken() *mutation {
	t := &killToken{name: w.thing("token")}
	m := &mutation{what: "create token"}
	add := func() {
		w.tokens = append(w.tokens, t)
		m.events = []string{eventOf("token.create", w.home.id, t.id.String())}
	}
	m.do = func(ctx context.Context) error {
		made, err := w.client.CreateToken(ctx, admin.TokenInput{Name: t.name, Role: admin.RoleAuditor, InstanceID: w.home.id})
		if err == nil {
			t.id, t.secret = made.Token.ID, made.Secret
			add()
		}
		return err
	}
	m.done = func(ctx context.Context) (bool, error) {
		all, err := w.client.Tokens(ctx)
		at := slices.IndexFunc(all, func(got admin.TokenRecord) bool { return got.Name == t.name })
		if err != nil || at < 0 {
			return false, err
		}
		t.id = all[at].ID
		return true, nil
	}
	m.adopt = add
	return m
}

func (w *killWriter) revokeToken(t *killToken) *mutation {
	return &mutation{
		what: "revoke token", events: []string{eventOf("token.revoke", w.home.id, t.id.String())},
		do: func(ctx context.Context) error {
			_, err := w.client.RevokeToken(ctx, t.id)
			if err == nil {
				t.gone = true
			}
			return err
		},
		done: func(ctx context.Context) (bool, error) {
			all, err := w.client.Tokens(ctx)
			at := slices.IndexFunc(all, func(got admin.TokenRecord) bool { return got.ID == t.id })
			if err == nil && at < 0 {
				err = errors.New("it is not there any more")
			}
			return err == nil && all[at].Status == "revoked", err
		},
	}
}

// settle finds out, after a kill, what became of the change that was not acknowledged, and finishes it.
// written is how often the audit has each event. It returns whether the change had been made.
func (w *killWriter) settle(ctx context.Context, written map[string]int) (made bool, err error) {
	m := w.pending
	if m == nil {
		return false, nil
	}
	if made, err = m.done(ctx); err != nil {
		return made, fmt.Errorf("%s: %w", m.what, err)
	}
	for _, e := range m.events { // the change and its event: both or none
		want := w.events[e]
		if made {
			want++
		}
		if written[e] != want {
			return made, fmt.Errorf("%s, done: %t: the audit has %d times %q, want %d", m.what, made, written[e], e, want)
		}
	}
	if made && m.adopt != nil {
		m.adopt()
		m.do = func(context.Context) error { return nil }
	}
	if err := w.step(ctx, m); err != nil {
		return made, fmt.Errorf("repeated: %w", err)
	}
	if made && m.again {
		for _, e := range m.events {
			w.events[e]++
		}
	}
	return made, nil
}

// look checks keys: those that were changed since the last time and a few others, or all.
func (w *killWriter) look(ctx context.Context, conn *envoyConn, all bool) error {
	var problems []error
	wrong := func(format string, args ...any) {
		problems = append(problems, errors.New(w.name+": "+fmt.Sprintf(format, args...)))
	}
	asked := func(what, secret string, works bool) {
		want := http.StatusUnauthorized
		if works {
			want = http.StatusOK
		}
		if got, err := conn.status(secret, http.MethodGet, "/"); err != nil || got != want {
			wrong("%s: got %d, %v, want %d", what, got, err, want)
		}
	}
	for _, i := range []*killTenant{&w.home, &w.spare} {
		if got, err := w.client.Instance(ctx, i.id); missing(err) == i.exists || err != nil && !missing(err) {
			wrong("instance %s, want it there: %t: %v", i.id, i.exists, err)
		} else if i.exists && (got.Policy.Disabled != i.disabled || got.Policy.Caps.User != i.userCap) {
			wrong("instance %s: disabled %t, cap %d, want %t, %d", i.id, got.Policy.Disabled, got.Policy.Caps.User, i.disabled, i.userCap)
		}
		for _, k := range i.keys {
			if !k.fresh && !all && w.random.IntN(10) > 0 {
				continue
			}
			k.fresh = false
			got, err := w.client.Key(ctx, i.id, k.id)
			if err != nil {
				wrong("key %s %s: %v", k.name, k.id, err)
				continue
			}
			if why := k.differs(got); why != "" {
				wrong("key %s %s: %s", k.name, k.id, why)
			}
			for g, secret := range k.secrets {
				asked(fmt.Sprintf("key %s %s, generation %d", k.name, k.id, g+1), secret, !i.disabled && !k.disabled && !k.gone && !k.ended[g])
			}
		}
		for n, secret := range i.lost {
			if all || n >= len(i.lost)-3 {
				asked("a key of an instance that was deleted", secret, false)
			}
		}
	}
	for n, t := range w.tokens {
		if t.secret.IsZero() || !all && n < len(w.tokens)-2 {
			continue
		}
		_, err := manage.NewClient(w.manage, t.secret, w.web).Instance(ctx, w.home.id)
		answer, refused := errors.AsType[*manage.Error](err)
		if err != nil && !refused || refused != t.gone || refused && answer.Status != http.StatusUnauthorized {
			wrong("token %s, revoked: %t: got %v", t.name, t.gone, err)
		}
	}
	if w.replay != nil {
		if err := w.replay(ctx); err != nil {
			wrong("repeated with its Idempotency-Key: %v", err)
		}
	}
	return errors.Join(problems...)
}

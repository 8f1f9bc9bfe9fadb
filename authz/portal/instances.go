package portal

import (
	"errors"
	"net/http"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// instancePages registers the way to an instance.
func (p *portal) instancePages() {
	p.page("", "GET /{$}", p.home)
	p.page("", "GET /instances", p.instances)
	p.page("", "POST /instances", p.createInstance)
}

// An instancesView is the page to choose an instance.
type instancesView struct {
	Instances []*apikey.Instance
	Unlisted  bool // the caller may not see which there are: it has to know
	ID        string
	Faults    map[string]string
}

// home goes to the caller's instance, or to where it chooses one.
func (p *portal) home(w http.ResponseWriter, v *visit) error {
	if v.Caller.InstanceID != "" {
		v.Instance = v.Caller.InstanceID
		p.redirect(w, v.Request, v.Path("keys"))
		return nil
	}
	if v.Can("instance.read") {
		all, err := p.svc.Instances(v.Context(), v.Caller)
		if err != nil {
			return err
		}
		if len(all) == 1 {
			v.Instance = all[0].ID
			p.redirect(w, v.Request, v.Path("keys"))
			return nil
		}
	}
	p.redirect(w, v.Request, "/instances")
	return nil
}

func (p *portal) instances(w http.ResponseWriter, v *visit) error {
	if id := v.FormValue("id"); id != "" { // of who may not see which there are
		canonical, err := apikey.CanonicalInstanceID(id)
		if err != nil {
			return p.showInstances(w, v, http.StatusBadRequest, instancesView{ID: id, Faults: map[string]string{"id": "is no id that an instance can have"}})
		}
		v.Instance = canonical
		p.redirect(w, v.Request, v.Path("keys"))
		return nil
	}
	return p.showInstances(w, v, http.StatusOK, instancesView{})
}

func (p *portal) showInstances(w http.ResponseWriter, v *visit, status int, data instancesView) (err error) {
	if v.Can("instance.read") {
		if data.Instances, err = p.svc.Instances(v.Context(), v.Caller); err != nil {
			return err
		}
	} else {
		data.Unlisted = true
	}
	return p.showAs(w, v, status, "instances", "Instances", data)
}

func (p *portal) createInstance(w http.ResponseWriter, v *visit) error {
	id := v.PostForm.Get("id")
	canonical, err := apikey.CanonicalInstanceID(id)
	if err == nil {
		_, err = p.svc.PutInstanceIf(v.Context(), v.Caller, canonical, apikey.Policy{}, admin.IfAbsent)
	}
	if errors.Is(err, admin.ErrPrecondition) {
		return p.showInstances(w, v, http.StatusConflict, instancesView{ID: id, Faults: map[string]string{"id": "is there already"}})
	}
	if bad, rest := faultsOf(err); len(bad) > 0 && len(rest) == 0 {
		text := ""
		for _, reason := range bad {
			text = join(text, reason)
		}
		return p.showInstances(w, v, http.StatusBadRequest, instancesView{ID: id, Faults: map[string]string{"id": text}})
	}
	if err != nil {
		return err
	}
	v.Instance = canonical
	return p.done(w, v, v.Path("keys"), "The instance is there. It has no keys yet: create the first one.")
}
